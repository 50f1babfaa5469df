"""The histories on a real Postgres: where they lead, and what they make of the data that is there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
import zlib
from datetime import UTC
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, make_url

import migrations
import notification_service.tables
import user_service.tables
from migrations import runner
from servicekit import schema
from tests.harness import Database, Databases, Services, until
from tests.migrations.commands import KINDS, Kind, Run, command_line, migrate, step
from tests.users.calls import create, replay, stub_of
from tidings.users.v1 import users_pb2

METADATA = {"users": user_service.tables.metadata, "notifications": notification_service.tables.metadata}

_INDEXES = "SELECT indexname::text, indexdef::text FROM pg_indexes WHERE schemaname = 'public'"
_CONSTRAINTS = (
    "SELECT conname::text, conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE connamespace = 'public'::regnamespace"
)

_COLUMNS = (
    "SELECT table_name::text, column_name::text, data_type::text, is_nullable::text, column_default::text"
    " FROM information_schema.columns WHERE table_schema = 'public'"
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
    # Autogenerate does not compare all of an index, a constraint or a default; Postgres itself tells.
    for query in (_INDEXES, _CONSTRAINTS, _COLUMNS):
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
    assert (await command_line("upgrade", "all", **urls)).code == 0
    assert await command_line("check", "all", **urls) == Run(0, "")
    for made, required in (
        (users, user_service.tables.SCHEMA_REVISION),
        (notifications, notification_service.tables.SCHEMA_REVISION),
    ):
        async with await made.connect() as connection:
            assert await schema.revision(connection) == required


async def test_drift_is_told_and_is_a_failure(databases: Databases) -> None:
    made = await databases.blank("users")
    run = await migrate("users", made, "check", "users")
    assert (run.code, run.output) == (1, f"error: users: is at revision nothing, the code at {runner.head('users')}\n")
    assert (await migrate("users", made)).code == 0
    await made.fetch("ALTER TABLE users ADD nickname text, ALTER locale DROP NOT NULL")
    run = await migrate("users", made, "check", "users")
    assert run.code == 1
    assert "remove_column" in run.output
    assert "nickname" in run.output
    assert "modify_nullable" in run.output
    run = await migrate("users", made, "downgrade", "users", "0007")
    assert (run.code, run.output) == (1, "error: users: Can't locate revision identified by '0007'\n")


async def _add_people(made: Database, people: dict[uuid.UUID, str]) -> None:
    """Adds users to a database at revision 0001, the last id first."""
    rows = sorted(people.items(), reverse=True)
    async with await made.connect() as connection, connection.cursor() as cursor:
        await cursor.executemany("INSERT INTO users (id, username) VALUES (%s, %s)", rows)


def _people(count: int) -> dict[uuid.UUID, str]:
    """Names by id, from the lowest id there is."""
    return {uuid.UUID(int=number): f"early-{number}" for number in range(count)}


async def test_people_of_the_first_days_are_in_the_feed(databases: Databases, services: Services) -> None:
    made = await databases.blank("users")
    await step(made, "0001")
    people = _people(2501)
    ids = list(people)
    # Nothing forbade this in the first days, and no address can be made of it.
    people[ids[8]] = "EARLY-7"
    people[ids[9]] = "two..dots and more"
    await _add_people(made, people)
    await step(made, "0002")
    addresses = await made.fetch("SELECT id, email, email_key FROM users")
    assert sorted(addresses) == [(one, f"{one}@users.invalid", f"{one}@users.invalid") for one in ids]
    await made.fetch(
        "UPDATE users SET email = 'Anna@example.com', email_key = 'anna@example.com' WHERE id = %s", ids[0]
    )
    assert (await migrate("users", made)).code == 0
    await made.fetch("GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC")

    stub = stub_of(await services.users(made).start())
    late = await stub.CreateUser(create())
    events = await replay(stub)
    assert [event.position for event in events] == list(range(1, 2503))
    assert [event.user.id for event in events] == [str(one) for one in ids] + [late.id]
    assert [event.user.username for event in events[:-1]] == list(people.values())
    assert {event.type for event in events} == {users_pb2.UserEvent.CREATED}
    assert {tuple(event.changed_fields) for event in events[:-1]} == {("username", "email")}
    assert len({event.id for event in events}) == len(events)
    assert events[0].user.email == "Anna@example.com"
    for event in (events[0], events[2500]):
        assert await stub.GetUser(users_pb2.GetUserRequest(id=event.user.id)) == event.user


async def test_what_is_stored_beside_an_event_is_what_the_event_says(databases: Databases) -> None:
    made = await databases.blank("users")
    await step(made, "0001")
    await _add_people(made, _people(5))
    assert (await migrate("users", made)).code == 0
    stored = await made.fetch(
        "SELECT position, event_id, user_id, shard_hash, type, changed_fields, group_end, commit_time, element,"
        " previous FROM user_events ORDER BY position"
    )
    assert len(stored) == 5
    numbers = users_pb2.User.DESCRIPTOR.fields_by_name
    for position, event_id, user_id, shard_hash, kind, changed, group_end, commit_time, element, previous in stored:
        assert isinstance(element, bytes)
        assert isinstance(user_id, uuid.UUID)
        (event,) = users_pb2.WatchUsersResponse.FromString(element).events
        assert (event.position, event.id, event.user.id, event.type) == (position, str(event_id), str(user_id), kind)
        assert event.commit_time.ToDatetime(UTC) == commit_time
        assert changed == sum(1 << numbers[name].number for name in event.changed_fields)
        assert shard_hash == zlib.crc32(user_id.bytes)
        assert (group_end, previous) == (True, None)
        assert event.user.create_time == event.user.update_time
        assert event.user.version == 1
    times = {row[7] for row in stored}
    assert await made.fetch("SELECT head_position, earliest_position, head_time FROM feed") == [(5, 1, *times)]
    assert await made.fetch("SELECT count(*) FROM users WHERE update_time IS DISTINCT FROM create_time") == [(0,)]
    # Autogenerate does not see these.
    ((options,),) = await made.fetch("SELECT reloptions FROM pg_class WHERE oid = 'feed'::regclass")
    assert isinstance(options, list)
    assert sorted(options) == [
        "autovacuum_vacuum_cost_delay=0",
        "autovacuum_vacuum_scale_factor=0",
        "autovacuum_vacuum_threshold=200",
        "fillfactor=10",
    ]


async def test_going_back_before_segments_brings_every_event_back(databases: Databases, services: Services) -> None:
    made = await databases.users()
    service = await services.users(
        made, segment_events=3, unsealed_events=3, seal_interval=0.05, segment_span=3600
    ).start()
    stub = stub_of(service)
    for _ in range(4):
        one = await stub.CreateUser(create(labels={"team": "red"}))
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=one.id))
    await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=[create() for _ in range(2)]))
    events = await replay(stub, include_previous=True)
    everything = "SELECT * FROM user_events ORDER BY position"

    async def sealed() -> bool:
        return await made.fetch("SELECT sum(last_position - first_position + 1) FROM segments") == [(6,)]

    await until(sealed)
    await service.stop()
    left = await made.fetch(everything)
    assert [position for position, *_ in left] == [7, 8, 9, 10]
    assert (await migrate("users", made, "downgrade", "users", "0003")).code == 0
    back = await made.fetch(everything)
    assert [position for position, *_ in back] == list(range(1, 11))
    assert back[6:] == left
    assert {row[3] == zlib.crc32(row[2].bytes) for row in back if isinstance(row[2], uuid.UUID)} == {True}
    assert (await migrate("users", made)).code == 0
    assert await made.fetch("SELECT count(*) FROM segments") == [(0,)]
    await service.restart()
    assert await replay(stub_of(service), include_previous=True) == events


async def test_how_events_are_stored(databases: Databases) -> None:
    # Autogenerate does not see these.
    made = await databases.users()
    [[options]] = await made.fetch("SELECT reloptions FROM pg_class WHERE oid = 'user_events'::regclass")
    assert isinstance(options, list)
    assert sorted(options) == [
        "autovacuum_vacuum_cost_delay=0",
        "autovacuum_vacuum_scale_factor=0.02",
        "autovacuum_vacuum_threshold=10000",
    ]
    assert await made.fetch(
        "SELECT DISTINCT attstorage::text FROM pg_attribute"
        " WHERE attrelid = 'segments'::regclass AND attnum > 0 AND atttypid = 'bytea'::regtype"
    ) == [("e",)]


async def test_writers_go_on_until_everybody_has_an_address(databases: Databases) -> None:
    made = await databases.blank("users")
    await step(made, "0001")
    await _add_people(made, _people(20_000))
    written, refused = 0, False
    async with await made.connect() as writer:
        upgrading = asyncio.create_task(step(made, "0002"))
        while not upgrading.done():
            try:
                await writer.execute("INSERT INTO users (id, username) VALUES (gen_random_uuid(), %s)", (str(written),))
            except (psycopg.errors.CheckViolation, psycopg.errors.NotNullViolation):
                refused = True
                break
            written += 1
    await upgrading
    assert written
    assert refused
    assert await made.fetch("SELECT count(*), count(DISTINCT email_key) FROM users") == [(20_000 + written,) * 2]


async def test_a_revision_of_several_commits_is_done_again_after_a_failure(databases: Databases) -> None:
    made = await databases.blank("users")
    await step(made, "0001")
    await _add_people(made, _people(2500))
    await made.fetch("ALTER TABLE users ADD email text, ADD email_key text")
    await made.fetch("UPDATE users SET email = 'x@example.com', email_key = email WHERE username < 'early-2'")
    await made.fetch("UPDATE users SET email_key = email WHERE email IS NOT NULL")
    run = await migrate("users", made)
    assert run.code == 1
    assert "Key (email_key)=(x@example.com) is duplicated" in run.output
    assert await made.fetch("SELECT version_num FROM alembic_version") == [("0001",)]
    # What Postgres leaves of an index that could not be built.
    assert await made.fetch("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid") == [
        ("users_email_key_key",)
    ]
    await made.fetch("UPDATE users SET email = username, email_key = username WHERE email = 'x@example.com'")
    assert (await migrate("users", made)).code == 0
    assert await migrate("users", made, "check", "users") == Run(0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_linter_has_nothing_to_say(kind: Kind, tmp_path: Path) -> None:
    history = tmp_path / f"{kind}.sql"
    history.write_text(runner.sql(kind))
    squawk, config = Path(sys.executable).with_name("squawk"), Path(migrations.__file__).with_name("squawk.toml")
    found = subprocess.run([squawk, "--config", config, history], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
