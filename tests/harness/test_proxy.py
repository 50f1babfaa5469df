"""The fault proxy does to a connection what its name says, whichever way the client says COMMIT."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from servicekit import database
from tests.harness import Action, Database, Databases, PostgresProxy, is_commit, sql_contains, until


@pytest.fixture
async def table(databases: Databases) -> Database:
    blank = await databases.blank("users")
    await blank.fetch("CREATE TABLE kept (n int)")
    await blank.fetch("GRANT ALL ON kept TO PUBLIC")
    return blank


async def _insert(connection: database.Connection, n: int, *, pipelined: bool) -> None:
    if pipelined:
        async with connection.pipeline():
            await connection.execute("BEGIN")
            await connection.execute("INSERT INTO kept VALUES (%s)", [n])
            await connection.execute("COMMIT")
        return
    await connection.execute("BEGIN")
    await connection.execute("INSERT INTO kept VALUES (%s)", [n])
    await connection.execute("COMMIT")


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("warm", [0, 3], ids=["first", "prepared"])
@pytest.mark.parametrize(("action", "stored"), [(Action.CUT_BEFORE, 0), (Action.CUT_AFTER, 1)])
async def test_cut_around_commit(
    proxy: PostgresProxy, table: Database, action: Action, stored: int, warm: int, pipelined: bool
) -> None:
    connection = await database.connect(proxy.url(table), "a-writer")
    for _ in range(warm):
        await _insert(connection, 0, pipelined=pipelined)
    fault = proxy.arm("*-writer", action, is_commit)
    with pytest.raises(psycopg.OperationalError):
        await _insert(connection, 1, pipelined=pipelined)
    assert connection.closed
    await fault.happened()

    async def sessions() -> bool:
        return await table.fetch("SELECT FROM pg_stat_activity WHERE application_name = 'a-writer'") == []

    await until(sessions)
    assert await table.fetch("SELECT count(*) FROM kept WHERE n = 1") == [(stored,)]

    async with await database.connect(proxy.url(table), "a-writer") as again:
        await _insert(again, 2, pipelined=pipelined)
    assert fault.hits == 1
    assert proxy.opened["a-writer"] == 2


async def test_hold_the_answer(proxy: PostgresProxy, table: Database) -> None:
    connection = await database.connect(proxy.url(table), "held")
    fault = proxy.arm("held", Action.HOLD_AFTER, is_commit)
    inserting = asyncio.create_task(_insert(connection, 1, pipelined=True))
    await fault.happened()
    assert await table.fetch("SELECT n FROM kept") == [(1,)]
    assert not inserting.done()
    fault.release()
    await inserting
    await connection.close()


async def test_hold_the_question(proxy: PostgresProxy, table: Database) -> None:
    connection = await database.connect(proxy.url(table), "held")
    fault = proxy.arm("held", Action.HOLD_BEFORE, sql_contains("INSERT INTO kept"))
    inserting = asyncio.create_task(_insert(connection, 1, pipelined=False))
    await fault.happened()
    assert await table.fetch("SELECT n FROM kept") == []
    fault.release()
    await inserting
    assert await table.fetch("SELECT n FROM kept") == [(1,)]
    await connection.close()


async def test_other_applications_are_left_alone(proxy: PostgresProxy, table: Database) -> None:
    proxy.arm("writer", Action.CUT_BEFORE, is_commit)
    async with await database.connect(proxy.url(table), "reader") as reader:
        await _insert(reader, 1, pipelined=True)
        assert proxy.active("reader") == 1
        assert proxy.cut("reader") == 1
        with pytest.raises(psycopg.OperationalError):
            await reader.execute("SELECT 1")
    proxy.refusing = True
    with pytest.raises(psycopg.OperationalError):
        await database.connect(proxy.url(table), "reader")
