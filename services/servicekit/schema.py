"""The schema gate: a service waits for the schema it needs and never migrates.

Revisions are numbered ("0001", "0002" ...), so that an older schema can be told from a newer one that this image does
not know. A newer one passes: migrations expand before they contract, and a rollback must find a schema it can run on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psycopg

from servicekit import database, logs

log = logs.get(__name__)

VERSION_TABLE = "alembic_version"


async def revision(connection: database.Connection) -> str | None:
    """The revision of the connected database; None before its first migration."""
    try:
        cursor = await connection.execute(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608
        row = await cursor.fetchone()
    except psycopg.errors.UndefinedTable:
        return None
    return row[0] if row else None


class NoSchemaError(Exception):
    """The schema was not there in time; the message says what was."""


async def look(pool: database.Pool, required: str) -> tuple[str, str]:
    """The revision of a service's database, empty if there is none, and why the service cannot use it, if so."""
    try:
        async with pool.connection() as connection:
            current = await revision(connection)
    except psycopg.OperationalError as error:
        log.debug("database not reachable", error=str(error).strip())
        return "", "the database is not reachable"
    if current is not None and current >= required:
        return current, ""
    return current or "", f"the schema is at {current or 'nothing'}, {required} is needed"


async def wait(
    url: str,
    application: str,
    required: str,
    *,
    interval: float = 1.0,
    timeout: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> str:
    """Returns the revision once the database is at `required` or newer, and logs what it waits for.

    `tell` is told the same without a word of the database's. Raises NoSchemaError after `timeout` seconds; without one
    it waits for ever.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    said = None
    while True:
        try:
            connection = await database.connect(url, f"{application}-schema")
            async with connection:
                current = await revision(connection)
        except psycopg.OperationalError as error:
            told, state = "the database is not reachable", f"database not reachable: {_first_line(error)}"
        except psycopg.errors.InsufficientPrivilege as error:
            # The migrations give the right to read it.
            told, state = "the schema cannot be read", f"schema cannot be read: {_first_line(error)}"
        else:
            if current is not None and current >= required:
                log.info("schema is ready", revision=current, required=required)
                return current
            told = state = f"schema is at {current or 'nothing'}"
        tell(f"waiting for the schema {required}: {told}")
        if state != said:
            log.info("waiting for the schema", state=state, required=required)
            said = state
        if deadline is not None and time.monotonic() >= deadline:
            raise NoSchemaError(state)
        await asyncio.sleep(interval)


def _first_line(error: psycopg.Error) -> str:
    return str(error).strip().splitlines()[0]
