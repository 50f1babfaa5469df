"""The schema gate: a service waits for the schema it needs and never migrates.

Revisions are numbered ("0001", "0002" ...), so that an older schema can be told from a newer one that this image does
not know. A newer one passes: migrations expand before they contract, and a rollback must find a schema it can run on.
"""

from __future__ import annotations

import asyncio

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


async def wait(url: str, application: str, required: str, *, interval: float = 1.0) -> None:
    """Returns once the database is at `required` or newer; logs what it waits for, and waits for ever."""
    said = None
    while True:
        try:
            connection = await database.connect(url, f"{application}-schema")
            async with connection:
                current = await revision(connection)
        except psycopg.OperationalError as error:
            state = f"database not reachable: {str(error).strip().splitlines()[0]}"
        else:
            if current is not None and current >= required:
                log.info("schema is ready", revision=current, required=required)
                return
            state = f"schema is at {current or 'nothing'}"
        if state != said:
            log.info("waiting for the schema", state=state, required=required)
            said = state
        await asyncio.sleep(interval)
