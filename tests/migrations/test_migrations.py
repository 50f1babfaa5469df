"""The migrations on a real Postgres, run as the Job runs them."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from dataclasses import dataclass
from typing import Literal

import pytest
from sqlalchemy import create_engine, make_url

import notification_service.tables
import user_service.tables
from migrations import runner
from servicekit import database, schema
from tests.harness import Database, Databases, Services, free_port, until
from tidings.users.v1 import users_pb2

Kind = Literal["users", "notifications"]
KINDS: tuple[Kind, ...] = ("users", "notifications")
METADATA = {"users": user_service.tables.metadata, "notifications": notification_service.tables.metadata}


@dataclass(frozen=True)
class Run:
    """What a run of the command printed, and its exit code."""

    code: int
    output: str


async def migrations(*arguments: str, **variables: str) -> Run:
    """Runs `python -m migrations` with these variables in its environment."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrations", *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **variables},
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode is not None
    return Run(process.returncode, output.decode())


async def migrate(kind: Kind, made: Database, *arguments: str, **variables: str) -> Run:
    """Runs a command on one database: an upgrade unless another is named."""
    command = arguments or ("upgrade", kind)
    return await migrations(*command, **{f"TIDINGS_{kind.upper()}_DATABASE_URL": made.url}, **variables)


async def _step(made: Database, revision: str) -> None:
    """Brings a users database to one revision of the history."""

    def upgrade() -> None:
        from alembic import command

        engine = create_engine(make_url(made.url).set(drivername="postgresql+psycopg"))
        with engine.connect() as connection:
            command.upgrade(runner._config("users", connection=connection), revision)
        engine.dispose()

    await asyncio.to_thread(upgrade)


_INDEXES = "SELECT indexname::text, indexdef::text FROM pg_indexes WHERE schemaname = 'public'"
_CONSTRAINTS = (
    "SELECT conname::text, conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE connamespace = 'public'::regnamespace"
)


def _named_otherwise(rows: list[tuple[object, ...]]) -> set[tuple[object, ...]]:
    """The version table's own, which the code's tables do not have."""
    return {row for row in rows if "alembic_version" in str(row)}


@pytest.mark.parametrize("kind", KINDS)
async def test_from_nothing_to_the_tables_of_the_code(databases: Databases, kind: Kind) -> None:
    migrated, created = await databases.blank(kind), await databases.blank(kind)
    assert (await migrate(kind, migrated)).code == 0
    assert await migrate(kind, migrated, "check", kind) == Run(0, "")
    engine = create_engine(make_url(created.url).set(drivername="postgresql+psycopg"))
    await asyncio.to_thread(METADATA[kind].create_all, engine)
    engine.dispose()
    # Autogenerate does not compare all of an index or a constraint; Postgres itself tells.
    for query in (_INDEXES, _CONSTRAINTS):
        theirs, ours = await created.fetch(query), await migrated.fetch(query)
        assert set(ours) - _named_otherwise(ours) == set(theirs) - _named_otherwise(theirs)


@pytest.mark.parametrize("kind", KINDS)
async def test_up_down_up(databases: Databases, kind: Kind) -> None:
    made = await databases.blank(kind)
    assert (await migrate(kind, made)).code == 0
    assert (await migrate(kind, made, "downgrade", kind, "base")).code == 0
    left = await made.fetch("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
    assert left == [("alembic_version",)]
    assert (await migrate(kind, made)).code == 0
    assert (await migrate(kind, made, "current", kind)).output == f"{kind}: {runner.head(kind)}\n"


async def test_all_databases_with_one_command(databases: Databases) -> None:
    users, notifications = await databases.blank("users"), await databases.blank("notifications")
    urls = {"TIDINGS_USERS_DATABASE_URL": users.url, "TIDINGS_NOTIFICATIONS_DATABASE_URL": notifications.url}
    assert (await migrations("upgrade", "all", **urls)).code == 0
    assert await migrations("check", "all", **urls) == Run(0, "")
    for made, required in (
        (users, user_service.tables.SCHEMA_REVISION),
        (notifications, notification_service.tables.SCHEMA_REVISION),
    ):
        async with await made.connect() as connection:
            assert await schema.revision(connection) == required


async def test_people_of_the_first_days_are_in_the_feed(databases: Databases, services: Services) -> None:
    made = await databases.blank("users")
    await _step(made, "0001")
    ids = [uuid.UUID(int=number) for number in range(1, 2502)]
    async with await made.connect() as connection, connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO users (id, username) VALUES (%s, %s)", [(one, f"early-{one.int}") for one in reversed(ids)]
        )
    await _step(made, "0002")
    assert await made.fetch("SELECT email, email_key FROM users WHERE username = 'early-7'") == [
        ("early-7@users.invalid", "early-7@users.invalid")
    ]
    await made.fetch(
        "UPDATE users SET email = 'Anna@example.com', email_key = 'anna@example.com' WHERE username = 'early-1'"
    )
    assert (await migrate("users", made)).code == 0
    await made.fetch("GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC")

    from tests.users.calls import create, replay, stub_of

    stub = stub_of(await services.users(made).start())
    late = await stub.CreateUser(create())
    events = await replay(stub)
    assert [event.position for event in events] == list(range(1, 2503))
    assert [event.user.id for event in events] == [str(one) for one in ids] + [late.id]
    assert {event.type for event in events} == {users_pb2.UserEvent.CREATED}
    assert events[0].user.email == "Anna@example.com"
    for event in (events[0], events[2500]):
        assert await stub.GetUser(users_pb2.GetUserRequest(id=event.user.id)) == event.user


async def test_two_runs_at_once(databases: Databases) -> None:
    made = await databases.blank("users")
    runs = await asyncio.gather(*(migrate("users", made) for _ in range(3)))
    assert [run.code for run in runs] == [0, 0, 0]
    assert sum(run.output.count("revision applied") for run in runs) == 3
    assert sum("nothing to do" in run.output for run in runs) == 2


async def test_a_schema_that_is_newer_is_left_alone(databases: Databases) -> None:
    made = await databases.blank("users")
    assert (await migrate("users", made)).code == 0
    await made.fetch("UPDATE alembic_version SET version_num = '9999'")
    run = await migrate("users", made)
    assert run.code == 0
    assert "nothing to do" in run.output
    assert (await migrate("users", made, "current", "users")).output == "users: 9999\n"


async def test_a_run_that_waits_too_long_names_who_it_waits_for(databases: Databases) -> None:
    made = await databases.blank("users")
    async with await database.connect(made.admin_url, "somebody-else") as holder:
        await holder.execute("SELECT pg_advisory_lock(hashtextextended('tidings migrations', 0))")
        run = await migrate("users", made, TIDINGS_MIGRATIONS_LOCK_WAIT="0.5")
    assert run.code == 1
    assert "somebody-else" in run.output
    assert "nothing was changed" in run.output
    assert await made.fetch("SELECT 1 FROM pg_tables WHERE tablename = 'users'") == []


_KILL_GUARD = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'tidings-migrations-lock' AND datname = current_database()"
)


async def _waits_for_a_lock(made: Database) -> bool:
    return bool(
        await made.fetch(
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'tidings-migrations'"
            " AND datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


async def test_a_locked_table_is_tried_again(databases: Databases) -> None:
    made = await databases.blank("users")
    await _step(made, "0001")
    async with await made.connect() as holder:
        await holder.execute("BEGIN")
        await holder.execute("LOCK TABLE users")
        short = {"TIDINGS_MIGRATIONS_LOCK_TIMEOUT": "0.2"}
        gave_up = await migrate("users", made, TIDINGS_MIGRATIONS_LOCK_TRIES="2", **short)
        assert gave_up.code == 1
        assert "a lock was not to be had within 0.2 s, 2 times" in gave_up.output
        running = asyncio.create_task(migrate("users", made, **short))
        for _ in range(2):
            await until(lambda: _waits_for_a_lock(made))
            await asyncio.sleep(0.25)
        await holder.execute("COMMIT")
    run = await running
    assert run.code == 0
    assert "trying again" in run.output


async def test_a_run_that_loses_its_lock_takes_its_revision_back(databases: Databases) -> None:
    made = await databases.blank("users")
    await _step(made, "0001")
    async with await made.connect() as holder:
        await holder.execute("BEGIN")
        await holder.execute("LOCK TABLE users")
        running = asyncio.create_task(migrate("users", made, TIDINGS_MIGRATIONS_LOCK_TIMEOUT="20"))
        await until(lambda: _waits_for_a_lock(made))
        await made.fetch(_KILL_GUARD)
        await holder.execute("COMMIT")
    run = await running
    assert run.code == 1
    assert "the migration lock was lost" in run.output
    assert await made.fetch("SELECT version_num FROM alembic_version") == [("0001",)]


async def test_exit_codes_and_messages() -> None:
    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    run = await migrations(
        "upgrade", "users", TIDINGS_USERS_DATABASE_URL=nowhere, TIDINGS_MIGRATIONS_CONNECT_WAIT="0.1"
    )
    assert run.code == 1
    assert "error: users: database not reachable" in run.output
    run = await migrations("upgrade", "users")
    assert (run.code, run.output) == (2, "error: TIDINGS_USERS_DATABASE_URL: Field required\n")
    run = await migrations("upgrade", "users", TIDINGS_MIGRATIONS_LOCK_TRIES="no")
    assert run.code == 2
    assert "TIDINGS_MIGRATIONS_LOCK_TRIES" in run.output
    run = await migrations("--help")
    assert run.code == 0
    assert "TIDINGS_MIGRATIONS_LOCK_WAIT" in run.output


async def test_the_services_wait_for_the_schema(databases: Databases, services: Services) -> None:
    made = await databases.blank("users")
    waiting = services.users(made)
    await waiting.launch()
    await waiting.wait_log("waiting for the schema", state="schema is at nothing")
    assert (await migrate("users", made)).code == 0
    await waiting.wait_ready()


@pytest.mark.parametrize("kind", KINDS)
def test_the_history_can_be_printed(kind: Kind) -> None:
    printed = runner.sql(kind)
    assert printed.count("BEGIN;") == printed.count("COMMIT;") == int(runner.head(kind))
