"""Removes what is no longer kept: answers to old request_ids, soft-deleted users whose time is over, and snapshots that
have expired.

In small statements, so that nothing waits for them. An undeletion is refused once `purge_time` is over, and a user is
removed only well after that, so that the two never meet.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import ColumnElement, Interval, Table, bindparam, delete, func, literal_column, select

from servicekit import logs, tasks
from servicekit.database import Pool, sql
from user_service.tables import answers, open_snapshots, users

log = logs.get(__name__)

INTERVAL = 60.0
_CHUNK = 1000
_PURGE_MARGIN = timedelta(hours=1)


def _delete_older(table: Table, column: str) -> str:
    row_id: ColumnElement[Any] = literal_column("ctid")
    too_old = table.c[column] < func.now() - bindparam("kept", type_=Interval())
    chunk = select(row_id).select_from(table).where(too_old).limit(literal_column(str(_CHUNK)))
    return sql(delete(table).where(row_id.in_(chunk)))


_FORGET_ANSWERS = _delete_older(answers, "create_time")
_PURGE_USERS = _delete_older(users, "purge_time")
_FORGET_SNAPSHOTS = _delete_older(open_snapshots, "expire_time")


async def run(pool: Pool, answers_kept: float) -> None:
    """A background loop: every minute removes what is due, chunk by chunk."""
    while True:
        try:
            forgotten = await _clear(pool, _FORGET_ANSWERS, timedelta(seconds=answers_kept))
            purged = await _clear(pool, _PURGE_USERS, _PURGE_MARGIN)
            await _clear(pool, _FORGET_SNAPSHOTS, timedelta())
        except psycopg.OperationalError as error:
            log.warning("clean-up is put off", error=str(error).strip())
        else:
            if forgotten or purged:
                log.info("cleaned up", answers=forgotten, users=purged)
        await asyncio.sleep(INTERVAL)


async def _clear(pool: Pool, statement: str, kept: timedelta) -> int:
    removed = 0
    while True:
        tasks.beat()
        async with pool.connection() as connection:
            cursor = await connection.execute(statement, {"kept": kept})
        removed += cursor.rowcount
        if cursor.rowcount < _CHUNK:
            return removed
