"""Removes events whose time is over: whole segments, from the earliest on, some at a time.

Each time is one statement that also moves the feed's edge, so that no reader finds a position missing that should be
there. It takes the lock of the feed's row, which the writer waits for, last. What follows the position of an open
snapshot stays. Two replicas at once do no harm: the second finds the rows gone and moves nothing.

The event before the earliest is kept in the feed's row, for streams may begin right after it.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import psycopg
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Interval,
    and_,
    bindparam,
    delete,
    func,
    literal_column,
    or_,
    select,
    update,
)

from servicekit import logs, tasks
from servicekit.database import Pool, sql
from user_service.segments import last_event_id
from user_service.tables import feed, open_snapshots, segments

log = logs.get(__name__)

_CHUNK = 20
_ENDLESS: ColumnElement[int] = literal_column(str(2**63 - 1))


def _expire(*, by_size: bool) -> str:
    # Begins at the earliest, for the rows before it may be deleted and not vacuumed.
    earliest = select(feed.c.earliest_position).scalar_subquery()
    older = func.sum(segments.c.size).over(order_by=segments.c.first_position) - segments.c.size
    oldest = (
        select(segments.c.first_position, segments.c.last_position, segments.c.last_time)
        .add_columns(*([older.label("older")] if by_size else []))
        .where(segments.c.first_position >= earliest)
        .order_by(segments.c.first_position)
        .limit(literal_column(str(_CHUNK)))
        .subquery("oldest")
    )
    is_over = oldest.c.last_time < func.now() - bindparam("kept", type_=Interval())
    if by_size:
        total = select(func.sum(segments.c.size)).scalar_subquery()
        is_over = or_(is_over, total - oldest.c.older > bindparam("kept_bytes", type_=BigInteger()))
    snapshots = select(func.min(open_snapshots.c.position)).where(open_snapshots.c.expire_time > func.now())
    is_free = oldest.c.last_position <= func.coalesce(snapshots.scalar_subquery(), _ENDLESS)
    # Whatever the times say, nothing is removed from behind something that stays.
    is_due = func.bool_and(and_(is_over, is_free)).over(order_by=oldest.c.first_position)
    marked = select(oldest.c.first_position, is_due.label("is_due")).subquery("marked")
    removed = (
        delete(segments)
        .where(segments.c.first_position.in_(select(marked.c.first_position).where(marked.c.is_due)))
        .returning(segments.c.last_position, segments.c.last_time, last_event_id().label("event_id"))
        .cte("removed")
    )
    edge = select(removed).order_by(removed.c.last_position.desc()).limit(literal_column("1")).subquery("edge")
    return sql(
        update(feed)
        .where(feed.c.earliest_position <= edge.c.last_position)
        .values(
            earliest_position=edge.c.last_position + literal_column("1"),
            edge_event_id=edge.c.event_id,
            edge_time=edge.c.last_time,
        )
        .returning(feed.c.earliest_position)
    )


_EXPIRE = {by_size: _expire(by_size=by_size) for by_size in (False, True)}


async def run(pool: Pool, kept: timedelta, kept_bytes: int | None, interval: float) -> None:
    """A background loop: every `interval` seconds removes what was committed longer ago than `kept`, and with
    `kept_bytes` the oldest segments until the rest is at most so large.
    """
    if kept_bytes is not None:
        log.warning("events are kept by size: subscribers may lose their place", bytes=kept_bytes)
    while True:
        try:
            earliest = None
            while (moved := await expire(pool, kept, kept_bytes)) is not None:
                earliest = moved
        except psycopg.OperationalError as error:
            log.warning("retention is put off", error=str(error).strip())
        else:
            if earliest is not None:
                log.info("events were removed", earliest_position=earliest)
        await asyncio.sleep(interval)


async def expire(pool: Pool, kept: timedelta, kept_bytes: int | None) -> int | None:
    """Removes some of what is due. Returns the earliest position if that has moved."""
    tasks.beat()
    async with pool.connection() as connection:
        cursor = await connection.execute(
            _EXPIRE[kept_bytes is not None], {"kept": kept, "kept_bytes": kept_bytes}, binary=True
        )
        row = await cursor.fetchone()
    return row[0] if row else None
