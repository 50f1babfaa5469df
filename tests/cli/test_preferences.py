"""`preferences` and `suppressions` against the real service's methods, on a real Postgres."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from notification_service import categories
from notification_service.api.preferences import PreferenceService
from servicekit import callers, database, guard
from tests.cli.conftest import System, Tidings
from tests.harness import Database
from tidings.notifications.v1 import preferences_pb2_grpc

USER = str(uuid.uuid4())


@pytest.fixture
async def service(system: System, notifications_database: Database) -> AsyncIterator[None]:
    """The service in place of what answers for the other commands."""
    async with database.pool(notifications_database.url, "tests", size=2) as pool:
        server = grpc.aio.server()
        guard.add(
            server,
            callers.anyone,
            preferences_pb2_grpc.add_PreferenceServiceServicer_to_server,
            PreferenceService(pool, categories.load(None)),
        )
        system.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        yield
        await server.stop(None)


@pytest.mark.usefixtures("service")
async def test_preferences(tidings: Tidings) -> None:
    ran = await tidings("preferences", "set", USER, "email", "off")
    assert (ran.code, ran.err) == (0, "")
    ran = await tidings("preferences", "set", USER, "email", "on", "--category", "account")
    assert ["account", "email", "on", "category"] in [line.split() for line in ran.out.splitlines()]
    hours = ("22:00", "07:00", "--weekday", "1", "--time-zone", "Asia/Tokyo")
    ran = await tidings("preferences", "quiet-hours", USER, *hours)
    assert "22:00 to 07:00 on weekdays 1 Asia/Tokyo" in ran.out
    found = json.loads((await tidings("preferences", "get", USER, "--json")).out)
    assert (found["version"], found["channels"], found["quiet_hours"]["weekdays"]) == ("3", {"email": False}, [1])
    assert found["categories"] == {"account": {"channels": {"email": True}}}
    await tidings("preferences", "set", USER, "email", "default", "--category", "account")
    ran = await tidings("preferences", "quiet-hours", USER, "--none", "--json")
    assert {"categories", "quiet_hours"}.isdisjoint(json.loads(ran.out))
    for arguments, code, message in (
        (("set", USER, "email", "off", "--category", "security"), 3, "is mandatory and cannot be switched off"),
        (("quiet-hours", USER, "25:00", "07:00"), 3, "preferences.quiet_hours.start: must be a local time, HH:MM"),
        (("quiet-hours", USER), 2, "give START and END, or --none alone"),
        (("get", "ada"), 3, "user_id: must be a UUID"),
    ):
        ran = await tidings("preferences", *arguments)
        assert (ran.code, message in ran.err) == (code, True), ran


@pytest.mark.usefixtures("service")
async def test_suppressions(tidings: Tidings) -> None:
    ran = await tidings("suppressions", "add", "Ada@example.com", "--reason", "bounced", "--detail", "full")
    assert (ran.code, ran.out, ran.err) == (0, "ada@example.com is suppressed\n", "")
    ran = await tidings("suppressions", "add", "ada@example.com")
    assert (ran.code, "ada@example.com is suppressed: BOUNCED" in ran.err) == (5, True)
    ran = await tidings("suppressions", "get", "ADA@example.com")
    assert [line.split(maxsplit=1)[1] for line in ran.out.splitlines()[1:]] == [
        "email", "ada@example.com", "bounced", "full"
    ]  # fmt: skip
    ran = await tidings("suppressions", "get", "ada@example.com", "--json")
    assert (json.loads(ran.out)["target"], json.loads(ran.out)["reason"]) == ("ada@example.com", "BOUNCED")
    ran = await tidings("suppressions", "get", "bob@example.com")
    assert (ran.code, "bob@example.com is not suppressed" in ran.err) == (4, True)
    await tidings("suppressions", "add", "bob@example.com")
    ran = await tidings("suppressions", "list", "--reason", "bounced", "--json")
    assert [json.loads(line)["target"] for line in ran.out.splitlines()] == ["ada@example.com"]
    ran = await tidings("suppressions", "list")
    assert [line.split()[2:] for line in ran.out.splitlines()[1:]] == [
        ["email", "ada@example.com", "bounced", "full"], ["email", "bob@example.com", "manual"]
    ]  # fmt: skip
    ran = await tidings("suppressions", "remove", "ADA@example.com")
    assert (ran.code, ran.out) == (0, "ada@example.com is written to again\n")
    assert (await tidings("suppressions", "remove", "ada@example.com")).code == 4
