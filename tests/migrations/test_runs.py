"""Runs of the migrations: one at a time, bounded in everything, and harmless when they fail."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import make_url

from servicekit import database
from tests.harness import Database, Databases, Services, free_port, until
from tests.migrations.commands import command_line, migrate, start, step

_VERSIONS = Path(__file__).parents[2] / "migrations/users/versions"


async def test_two_runs_at_once(databases: Databases) -> None:
    made = await databases.blank("users")
    runs = await asyncio.gather(*(migrate("users", made) for _ in range(3)))
    assert [run.code for run in runs] == [0, 0, 0]
    assert sum(run.output.count("revision applied") for run in runs) == len(list(_VERSIONS.glob("0*.py")))
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


_COLUMNS_OF_USERS = "SELECT column_name::text FROM information_schema.columns WHERE table_name = 'users' ORDER BY 1"
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
    await step(made, "0001")
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


# The step after 0001 has commits of its own, the one after 0002 is a single transaction.
@pytest.mark.parametrize("revision", ["0001", "0002"])
async def test_a_run_that_loses_its_lock_commits_nothing_more(databases: Databases, revision: str) -> None:
    made = await databases.blank("users")
    await step(made, revision)
    columns = await made.fetch(_COLUMNS_OF_USERS)
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
    assert await made.fetch("SELECT version_num FROM alembic_version") == [(revision,)]
    assert await made.fetch(_COLUMNS_OF_USERS) == columns


async def test_a_killed_run_is_soon_gone_from_postgres(databases: Databases) -> None:
    made = await databases.blank("users")
    await step(made, "0001")
    async with await made.connect() as holder:
        await holder.execute("BEGIN")
        await holder.execute("LOCK TABLE users")
        url = {"TIDINGS_USERS_DATABASE_URL": made.url, "TIDINGS_MIGRATIONS_LOCK_TIMEOUT": "100"}
        killed = await start("upgrade", "users", **url)
        await until(lambda: _waits_for_a_lock(made))
        killed.send_signal(signal.SIGKILL)
        await killed.wait()

        async def gone() -> bool:
            return not await _waits_for_a_lock(made)

        await until(gone)
        await holder.execute("COMMIT")
    assert (await migrate("users", made)).code == 0


async def test_a_stopped_run_takes_its_revision_back(databases: Databases) -> None:
    made = await databases.blank("users")
    await step(made, "0001")
    async with await made.connect() as holder:
        await holder.execute("BEGIN")
        await holder.execute("LOCK TABLE users")
        url = {"TIDINGS_USERS_DATABASE_URL": made.url, "TIDINGS_MIGRATIONS_LOCK_TIMEOUT": "100"}
        stopped = await start("upgrade", "users", **url)
        await until(lambda: _waits_for_a_lock(made))
        stopped.send_signal(signal.SIGTERM)
        output, _ = await stopped.communicate()
        assert stopped.returncode == 1
        assert output.decode().splitlines()[-1].startswith("error: stopped")
        assert "Traceback" not in output.decode()
        await holder.execute("COMMIT")
    assert await made.fetch("SELECT version_num FROM alembic_version") == [("0001",)]
    assert (await migrate("users", made)).code == 0


async def test_the_whole_url_is_used(databases: Databases) -> None:
    made = await databases.blank("users")
    await made.fetch("CREATE SCHEMA elsewhere AUTHORIZATION CURRENT_USER")
    await made.fetch("GRANT ALL ON SCHEMA elsewhere TO PUBLIC")
    parts = make_url(made.url)
    socket = quote(str(parts.query["host"]), safe="")
    url = f"postgresql://{parts.username}@{socket}/{parts.database}?options=-csearch_path%3Delsewhere"
    assert (await migrate("users", Database(made.name, url, made.admin_url))).code == 0
    schemas = await made.fetch("SELECT DISTINCT schemaname::text FROM pg_tables WHERE tablename IN ('users', 'feed')")
    assert schemas == [("elsewhere",)]


async def test_exit_codes_and_messages() -> None:
    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    run = await command_line(
        "upgrade", "users", TIDINGS_USERS_DATABASE_URL=nowhere, TIDINGS_MIGRATIONS_CONNECT_WAIT="0.1"
    )
    assert run.code == 1
    assert "error: users: database not reachable" in run.output
    run = await command_line("upgrade", "users")
    assert (run.code, run.output) == (2, "error: TIDINGS_USERS_DATABASE_URL: Field required\n")
    run = await command_line("upgrade", "users", TIDINGS_MIGRATIONS_LOCK_TRIES="no")
    assert run.code == 2
    assert "TIDINGS_MIGRATIONS_LOCK_TRIES" in run.output
    run = await command_line("--help")
    assert run.code == 0
    assert "TIDINGS_MIGRATIONS_LOCK_WAIT" in run.output


@pytest.mark.parametrize("url", ["", "secret", "host=/tmp password=secret", "postgresql://u:secret@h/d?nosuch=1"])
async def test_a_wrong_url_is_refused_and_not_shown(url: str) -> None:
    run = await command_line("upgrade", "users", TIDINGS_USERS_DATABASE_URL=url)
    assert run.code == 2
    assert run.output.startswith("error: TIDINGS_USERS_DATABASE_URL: ")
    assert "secret" not in run.output


async def test_the_services_wait_for_the_schema(databases: Databases, services: Services) -> None:
    made = await databases.blank("users")
    waiting = services.users(made)
    await waiting.launch()
    await waiting.wait_log("waiting for the schema", state="schema is at nothing")
    assert (await migrate("users", made)).code == 0
    await waiting.wait_ready()
