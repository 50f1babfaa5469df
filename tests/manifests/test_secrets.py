"""`python -m deploy.secrets`: what it makes is used by real servers and clients, and made once."""

from __future__ import annotations

import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import secrets
from servicekit import callers, rpc
from tests.manifests.objects import ROOT
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

_METHODS = {
    "user-service": rpc.methods(users_pb2.DESCRIPTOR.services_by_name["UserService"]),
    "notification-service": rpc.methods(notifications_pb2.DESCRIPTOR.services_by_name["NotificationService"]),
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A directory of secrets."""
    secrets.generate(tmp_path / "generated")
    return tmp_path / "generated"


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_nothing_is_made_twice_and_what_is_missing_is_made(made: Path) -> None:
    before = _contents(made)
    assert secrets.generate(made) == []
    (made / "postgres-users.password").unlink()
    assert secrets.generate(made) == ["postgres-users.password"]
    after = _contents(made)
    assert after.pop("postgres-users.password") != before.pop("postgres-users.password")
    assert after == before


def test_nothing_is_like_that_of_another_machine_or_open_to_its_others(made: Path, tmp_path: Path) -> None:
    secrets.generate(tmp_path / "other")
    other = _contents(tmp_path / "other")
    assert not [name for name, content in _contents(made).items() if other[name] == content]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600}


@pytest.mark.parametrize("service", secrets.CALLERS)
def test_callers_are_let_in_by_their_tokens(made: Path, service: str) -> None:
    known = callers.Tokens(made / f"{service}.callers.toml", _METHODS[service])
    grants = {grant.caller: grant for grant in known.grants.value.values()}
    assert set(grants) == {caller.name for caller in secrets.CALLERS[service]}
    for name, grant in grants.items():
        token = (made / f"{name}.token").read_text()
        assert known.grants.value[callers._digest(token)] is grant
    assert grants["admin"].methods == _METHODS[service]
    assert (grants["smoke-test"].methods or _METHODS[service]) < _METHODS[service]


@pytest.mark.parametrize("service", secrets.CALLERS)
def test_a_certificate_is_its_services_and_no_other(made: Path, service: str) -> None:
    def handshake(name: str) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(made / f"{service}.crt", made / f"{service}.key")
        client = ssl.create_default_context(cafile=str(made / "ca.crt"))
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(to_client, to_server, server_hostname=name),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        open_ends = set(ends)
        for _ in range(10):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                open_ends.discard(end)
        assert not open_ends

    for name in (service, f"{service}.tidings.svc.cluster.local", "localhost", "127.0.0.1"):
        handshake(name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake("somebody-else")


def test_the_program_says_what_it_made_and_git_ignores_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.secrets", "--directory", str(tmp_path / "x")]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(2))
    count = len(list((tmp_path / "x").iterdir()))
    assert first.stdout == f"secrets: {count} made in {tmp_path / 'x'}\n"
    assert second.stdout == f"secrets: all there in {tmp_path / 'x'}\n"
    if shutil.which("git") and (ROOT / ".git").exists():
        path = (secrets.DIRECTORY / "ca.key").relative_to(ROOT)
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0
