"""Who calls: what a file of callers may say, and what a token opens."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any, cast

import pytest

from servicekit import callers
from servicekit.addresses import is_loopback
from servicekit.callers import Call, Tokens, admit
from servicekit.configfile import InvalidConfigError
from servicekit.errors import PermissionDeniedError, ServiceError, UnauthenticatedError
from tests.harness import Callers, until

GET, WATCH, LIST = "t.v1.Users/GetUser", "t.v1.Users/WatchUsers", "t.v1.Others/ListOthers"
METHODS = (GET, WATCH, LIST)
HASH = "sha256:" + "0" * 64


class _Context:
    def __init__(self, *metadata: tuple[str, str]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


def call(*metadata: tuple[str, str]) -> Call:
    """A call with metadata."""
    return Call(cast("Any", _Context(*metadata)))


def bearer(token: str) -> Call:
    """A call with a token."""
    return call(("user-agent", "test"), ("authorization", f"Bearer {token}"))


@pytest.fixture
def file(tmp_path: Path) -> Callers:
    """A file of callers, empty."""
    return Callers(tmp_path / "callers.toml")


def test_a_token_names_its_caller_and_opens_its_methods(file: Callers) -> None:
    crm, admin = file.add("crm", "WatchUsers", "t.v1.Others/*"), file.add("admin")
    tokens = Tokens(file.path, METHODS)
    for token, name, method in ((crm, "crm", WATCH), (crm, "crm", LIST), *((admin, "admin", m) for m in METHODS)):
        made = bearer(token)
        admit(tokens, method, made)
        assert made.caller == name
    with pytest.raises(PermissionDeniedError) as caught:
        admit(tokens, GET, bearer(crm))
    assert (caught.value.reason, caught.value.metadata) == ("METHOD_NOT_ALLOWED", {"method": GET, "caller": "crm"})


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "MISSING_TOKEN"),
        ((("x-caller", "crm"), ("actor", "crm"), ("user-agent", "crm")), "MISSING_TOKEN"),
        ((("authorization", "Bearer nobody"),), "UNKNOWN_TOKEN"),
        ((("authorization", "Bearer "),), "UNKNOWN_TOKEN"),
        ((("authorization", HASH),), "UNKNOWN_TOKEN"),
        ((("authorization", f"Bearer {HASH}"),), "UNKNOWN_TOKEN"),
        ((("authorization", "Basic Y3JtOmNybQ=="),), "UNKNOWN_TOKEN"),
    ],
)
def test_nobody_else_gets_in(file: Callers, metadata: tuple[tuple[str, str], ...], reason: str) -> None:
    file.add("crm")
    with pytest.raises(UnauthenticatedError) as caught:
        admit(Tokens(file.path, METHODS), GET, call(*metadata))
    assert caught.value.reason == reason


def test_the_scheme_is_read_as_the_standard_has_it(file: Callers) -> None:
    token = file.add("crm")
    for value in (f"bearer {token}", f"BEARER  {token}"):
        made = call(("authorization", value))
        admit(Tokens(file.path, METHODS), GET, made)
        assert made.caller == "crm"


def test_without_a_file_everybody_is_nobody() -> None:
    made = call(("authorization", "Bearer crm"), ("x-caller", "crm"))
    admit(callers.anyone, GET, made)
    assert made.caller == callers.ANONYMOUS == ""


def entry(name: str = "crm", hash_: str = HASH, methods: str = '["*"]') -> str:
    """An entry's text."""
    return f'[[callers]]\nname = "{name}"\nhash = "{hash_}"\nmethods = {methods}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no [[callers]]"),
        ("[[callers]", "Expected"),
        ("[[caller]]\n", "found: caller"),
        (
            entry(methods='["GetUser", "DropUsers"]'),
            "caller 'crm': methods: no 'DropUsers' here, there are: t.v1.Others/",
        ),
        (entry(methods='["t.v2.Users/*"]'), "caller 'crm': methods: no 't.v2.Users/*' here"),
        (entry(methods="[]"), "caller 'crm': methods: "),
        (entry(name=""), "name: "),
        (entry(name="Crm"), "caller 'Crm': name: "),
        (entry(hash_="0" * 64), "caller 'crm': hash: "),
        (entry(hash_="md5:0"), "caller 'crm': hash: "),
        (entry() + entry("other"), "caller 'other': hash: is also that of caller 'crm'"),
        (entry() + 'token = "x"', "caller 'crm': token: "),
    ],
)
def test_a_wrong_file_is_named_with_its_entry(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "callers.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfigError) as caught:
        Tokens(path, METHODS)
    [line] = str(caught.value).splitlines()
    assert line.startswith(str(path))
    assert says in line


async def test_tokens_overlap_and_end_while_it_runs(file: Callers) -> None:
    old = file.add("crm")
    tokens = Tokens(file.path, METHODS)
    following = asyncio.create_task(tokens.grants.follow(0.01))

    def name(token: str) -> str | None:
        made = bearer(token)
        try:
            admit(tokens, GET, made)
        except ServiceError:
            return None
        return made.caller

    new = file.add("crm")
    await until(lambda: name(new) == "crm")
    assert name(old) == "crm"
    file.break_off()
    file.path.unlink()
    file.remove(old)
    await until(lambda: name(old) is None)
    assert name(new) == "crm"
    following.cancel()
    await asyncio.wait([following])


async def test_a_broken_file_keeps_the_callers(file: Callers, capsys: pytest.CaptureFixture[str]) -> None:
    token = file.add("crm")
    tokens = Tokens(file.path, METHODS)
    before = tokens.grants.value
    following = asyncio.create_task(tokens.grants.follow(0.01))
    file.break_off()
    said = ""

    def refused() -> bool:
        nonlocal said
        said += "".join(capsys.readouterr())
        return "a changed file cannot be used" in said

    await until(refused)
    assert tokens.grants.value is before
    # The same links elsewhere, as Kubernetes replaces what it mounts.
    (real := file.path.with_name("real.toml")).write_text(entry("other", f"sha256:{_hash(token)}"))
    file.path.unlink()
    file.path.symlink_to(real)
    await until(lambda: tokens.grants.value is not before)
    made = bearer(token)
    admit(tokens, GET, made)
    assert made.caller == "other"
    following.cancel()
    await asyncio.wait([following])


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.1.2.3:0", True),
        ("127.0.0.1", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("[::ffff:127.0.0.1]:50051", True),
        ("unix:/run/tidings.sock", True),
        ("unix-abstract:tidings", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("[::ffff:0.0.0.0]:50051", False),
        (":50051", False),
        ("*:50051", False),
        ("10.0.0.1:50051", False),
        ("[fe80::1]:50051", False),
        ("192.0.2.1", False),
        ("no-such-host.invalid:50051", False),
        ("", False),
    ],
)
def test_whom_an_address_is_reached_by(address: str, local: bool) -> None:
    assert is_loopback(address) is local


def test_a_name_is_local_only_if_all_its_addresses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    assert not is_loopback("both.example:50051")
    found.pop()
    assert is_loopback("both.example:50051")
