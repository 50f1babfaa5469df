"""`users create|get|list|update`: tables, JSON lines, errors of one line, exit codes."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import System, Tidings
from tidings.users.v1 import users_pb2


@pytest.fixture
async def ada(system: System) -> users_pb2.User:
    """A user with a name that tries to steer the terminal."""
    user = users_pb2.User(
        id="0193a5f0-7b1c-7e2a-9d41-2f6c0a8b5e17",
        username="ada",
        email="ada@example.com",
        display_name="Ada \x1b[31m[bold]Lovelace",
        labels={"team": "engines", "guest": "no"},
        version=3,
    )
    await system.directory.store(user, users_pb2.UserEvent.CREATED)
    return user


async def test_create(system: System, tidings: Tidings) -> None:
    ran = await tidings(
        "users", "create", "--username", "zoë", "--email", "zoe@example.com", "--label", "a=b=c", "--json"
    )
    assert (ran.code, ran.err) == (0, "")
    shown = json.loads(ran.out)
    assert shown["labels"] == {"a": "b=c"}
    assert shown["create_time"] == "2023-11-14T22:13:20Z"
    assert "zoë" in ran.out
    assert ran.out.count("\n") == 1


async def test_errors_name_the_field(tidings: Tidings, ada: users_pb2.User) -> None:
    bad = await tidings("users", "create", "--username", "bob", "--email", "bob")
    assert (bad.code, bad.out, bad.err) == (3, "", "error: user.email: must have an @\n")
    taken = await tidings("users", "create", "--username", "ada", "--email", "ada@example.org")
    assert (taken.code, taken.err) == (5, "error: user.username: ada is taken\n")
    missing = await tidings("users", "get", "x")
    assert (missing.code, missing.err) == (4, "error: id: no user x\n")
    missing = await tidings("users", "get", "--username", "ad")
    assert (missing.code, missing.err) == (4, "error: username: no user ad\n")


async def test_get(tidings: Tidings, ada: users_pb2.User) -> None:
    ran = await tidings("users", "get", "--username", "ada")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        f"id            {ada.id}",
        "username      ada",
        "email         ada@example.com",
        "display name  Ada \\x1b[31m[bold]Lovelace",
        "labels        guest=no team=engines",
        "version       3",
    ]


async def test_list(system: System, tidings: Tidings, ada: users_pb2.User) -> None:
    for number in range(60):
        user = users_pb2.User(id=f"id-{number}", username=f"user-{number}", email=f"{'x' * 60}{number}@example.com")
        await system.directory.store(user, users_pb2.UserEvent.CREATED)
    table = await tidings("users", "list")
    lines = table.out.splitlines()
    assert len(lines) == 51
    assert lines[0].split() == ["ID", "USERNAME", "EMAIL", "DISPLAY", "NAME", "VERSION", "CREATED"]
    assert lines[1].split()[:3] == [ada.id, "ada", "ada@example.com"]
    assert "\x1b" not in table.out
    assert table.err == "50 shown; there are more: --limit N or --all\n"
    everything = await tidings("users", "list", "--all", "--json")
    assert len(everything.out.splitlines()) == 61
    assert json.loads(everything.out.splitlines()[0])["display_name"] == "Ada \x1b[31m[bold]Lovelace"
    assert everything.err == ""


async def test_update(system: System, tidings: Tidings, ada: users_pb2.User) -> None:
    ran = await tidings(
        "users", "update", ada.id, "--display-name", "", "--label", "team=core", "--remove-label", "guest", "--json"
    )
    assert ran.code == 0
    shown = json.loads(ran.out)
    assert "display_name" not in shown
    assert shown["labels"] == {"team": "core"}
    assert shown["email"] == "ada@example.com"
    stale = await tidings("users", "update", ada.id, "--email", "new@example.com", "--version", "3")
    assert (stale.code, stale.err) == (5, "error: version: is stale\n")


async def test_nobody_listens(system: System, tidings: Tidings) -> None:
    await system.server.stop(None)
    ran = await tidings("users", "list")
    assert ran.code == 6
    assert ran.err.startswith(f"error: the user service at {system.address} is not available: ")
    assert ran.err.count("\n") == 1


async def test_wrong_usage(tidings: Tidings) -> None:
    ran = await tidings("users", "update", "x")
    assert ran.code == 2
    assert "nothing to change" in ran.err
