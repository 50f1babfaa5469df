"""Tokens and TLS of the command line, against a server that asks for both."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import pytest

from servicekit.callers import Tokens
from tests.cli.conftest import Tidings
from tests.harness import Authority, Callers, Database, ServiceProcess, Services

DENIED = 8


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Of the server's certificate."""
    return Authority(tmp_path)


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    """Who may call."""
    return Callers(tmp_path / "callers.toml")


@pytest.fixture
async def service(
    services: Services, users_database: Database, authority: Authority, callers: Callers
) -> ServiceProcess:
    """A user service that asks for a token, a certificate, and shows one."""
    certificate, key = authority.issue("server")
    callers.add("nobody")
    return await services.users(
        users_database,
        callers_file=callers.path,
        tls_certificate_file=certificate,
        tls_key_file=key,
        tls_client_ca_file=authority.ca,
        health_listen="127.0.0.1:0",
    ).start()


async def test_commands_over_tls_with_a_token(
    service: ServiceProcess, authority: Authority, callers: Callers, tidings: Tidings, tmp_path: Path
) -> None:
    certificate, key = authority.issue("client", "client")
    (tmp_path / "token").write_text(callers.add("ada"))
    await service.wait_log("a changed file is used")
    tls = ("--ca", str(authority.ca), "--cert", str(certificate), "--key", str(key))
    token = ("--token-file", "token")
    at = ("--users", service.address)
    create = ("users", "create", "--username", "ada", "--email", "ada@example.com", *at)

    made = await tidings(*tls, *token, *create, "--json")
    assert (made.code, made.err) == (0, "")
    watched = await tidings(*tls, *token, "users", "watch", "--from", "earliest", "--limit", "1", "--json", *at)
    assert json.loads(watched.out)["actor"] == "ada"

    refused = await tidings(*tls, *create)
    assert (refused.code, refused.out) == (DENIED, "")
    assert "no token" in refused.err
    refused = await tidings(*tls, "users", "watch", *at)
    assert refused.code == DENIED
    assert (await tidings(*token, *create)).code == 6

    ran = await tidings(*tls, "doctor", *at, "--notifications", "127.0.0.1:1", "--json")
    findings = {one["check"]: one for one in map(json.loads, ran.out.splitlines())}
    assert findings["user service"]["state"] == "ok"
    assert "no token" in findings["feed"]["message"]
    assert "--token-file" in findings["feed"]["advice"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--token-file", "missing"), "missing"),
        (("--token-file", "empty"), "empty: not a token"),
        (("--ca", "empty"), "empty: not certificates"),
        (("--cert", "empty"), "go together"),
        (("--token-file", "token", "--users", "192.0.2.1:1"), "in the clear"),
    ],
)
async def test_wrong_options_are_named(tidings: Tidings, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "token").write_text("secret")
    options, address = arguments[:2], arguments[2:]
    ran = await tidings(*options, "users", "list", *address)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


async def test_a_new_token_and_its_entry_fit(tidings: Tidings, tmp_path: Path) -> None:
    methods = ("--method", "t.v1.Users/Get*", "--method", "Watch*")
    ran = await tidings("token", "new", "crm", *methods)
    token, _, entry = ran.out.partition("\n")
    [table] = tomllib.loads(entry)["callers"]
    assert table == {
        "name": "crm",
        "hash": "sha256:" + hashlib.sha256(token.encode()).hexdigest(),
        "methods": ["t.v1.Users/Get*", "Watch*"],
    }
    assert token not in ran.err
    (path := tmp_path / "callers.toml").write_text(entry)
    grants = Tokens(path, ["t.v1.Users/GetUser", "t.v1.Users/WatchUsers"]).grants.value
    assert [grant.caller for grant in grants.values()] == ["crm"]

    other = json.loads((await tidings("token", "new", "crm", *methods, "--json")).out)
    assert other["token"] != token
    assert other.keys() == {"token", "name", "hash", "methods"}
    assert (await tidings("token", "new", "Not a name", *methods)).code == 2
    assert (await tidings("token", "new", "crm")).code == 2
