"""`python -m migrations wait`: what stands between a new pod and a schema it cannot use."""

from __future__ import annotations

import asyncio

import pytest

import user_service.tables
from migrations import waiting
from tests.harness import Database, Databases, free_port
from tests.migrations.commands import KINDS, Kind, command_line, migrate, start, step


async def _waits(made: Database, seconds: str = "0") -> tuple[int, str]:
    run = await migrate("users", made, "wait", "users", TIDINGS_MIGRATIONS_SCHEMA_WAIT=seconds)
    return run.code, run.output


@pytest.mark.parametrize("kind", KINDS)
async def test_a_schema_that_is_there_is_not_waited_for(databases: Databases, kind: Kind) -> None:
    made = await databases.blank(kind)
    assert (await migrate(kind, made)).code == 0
    run = await migrate(kind, made, "wait", kind, TIDINGS_MIGRATIONS_SCHEMA_WAIT="0")
    assert run.code == 0
    assert "schema is ready" in run.output
    # That of a release after this one: an image that is rolled back must start.
    await made.fetch("UPDATE alembic_version SET version_num = '9999'")
    assert (await migrate(kind, made, "wait", kind, TIDINGS_MIGRATIONS_SCHEMA_WAIT="0")).code == 0


async def test_what_is_not_there_in_time_is_said(databases: Databases) -> None:
    made = await databases.blank("users")
    code, output = await _waits(made)
    assert code == 1
    needed = user_service.tables.SCHEMA_REVISION
    assert f"error: users: schema is at nothing; waited 0 s for {needed} or newer" in output
    await step(made, "0001")
    code, output = await _waits(made)
    assert code == 1
    assert "error: users: schema is at 0001; waited 0 s" in output

    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    run = await command_line("wait", "users", TIDINGS_USERS_DATABASE_URL=nowhere, TIDINGS_MIGRATIONS_SCHEMA_WAIT="0")
    assert run.code == 1
    assert "error: users: database not reachable" in run.output


async def test_both_are_waited_for_while_they_are_made(databases: Databases) -> None:
    users, notifications = await databases.blank("users"), await databases.blank("notifications")
    assert (await migrate("users", users)).code == 0
    waiter = await start(
        "wait", "all",
        TIDINGS_USERS_DATABASE_URL=users.url,
        TIDINGS_NOTIFICATIONS_DATABASE_URL=notifications.url,
        TIDINGS_LOG_FORMAT="json",
    )  # fmt: skip
    assert waiter.stdout is not None
    said = b""
    while b"schema is at nothing" not in said:
        said = await asyncio.wait_for(waiter.stdout.readline(), 30)
        assert said, "it has ended"
    assert waiter.returncode is None
    assert (await migrate("notifications", notifications)).code == 0
    assert await asyncio.wait_for(waiter.wait(), 30) == 0


async def test_every_database_has_a_revision_to_wait_for() -> None:
    assert set(waiting.REQUIRED) == set(KINDS)
