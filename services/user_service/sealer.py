"""Seals old events: a background loop that moves the oldest of user_events, about a thousand at a time, into segments.

What always holds:
- An event is in one place: a segment is inserted by the statement that deletes its events.
- Segments hold what is retained from the earliest position on, without a hole; user_events holds what follows them.
- A segment ends where a group ends, and its last event was committed at most `span` after its first.
- Of all replicas one seals at a time, under a lock that ends with its transaction: one that is killed or paused in the
  middle leaves everything as it was, and is soon replaced.

The writer waits for none of this, and readers near the head meet none of it: the newest events stay where they are
until they have become old. Nothing is lost if a sealed segment is undone by a crash of Postgres: its events are back
then. So its transaction does not wait for the disk.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import reduce
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import BigInteger, Integer, bindparam, delete, func, insert, literal_column, select

from servicekit import database, logs, tasks
from servicekit.database import Connection, sql
from user_service.events import LARGEST_MESSAGE
from user_service.segments import packed
from user_service.tables import feed, segments, user_events
from user_service.validation import MOST_IN_BATCH

log = logs.get(__name__)

APPLICATION = "tidings-users-sealer"
_SESSION: dict[str, str | int] = {
    "synchronous_commit": "off",
    # A paused process must not keep the others from sealing.
    "idle_in_transaction_session_timeout": "2s",
    "transaction_timeout": "10s",
}
_LONGEST_RECONNECT = 5.0
# Of the time, at most so much is spent on sealing.
_SHARE = 0.25

_TRY_LOCK = "SELECT pg_try_advisory_xact_lock(hashtextextended('tidings sealer', 0))"


def _bigint(name: str) -> Any:
    return bindparam(name, type_=BigInteger())


_last_sealed = (
    select(segments.c.last_position).order_by(segments.c.first_position.desc()).limit(literal_column("1"))
).scalar_subquery()
_READ_STATE = sql(
    select(
        func.coalesce(_last_sealed, feed.c.earliest_position - literal_column("1")),
        feed.c.head_position,
        func.clock_timestamp(),
    )
)
# By position, not from the first row on: that would pass over every row deleted since the last vacuum.
_READ_LOOSE = sql(
    select(
        user_events.c.position,
        user_events.c.group_end,
        user_events.c.commit_time,
        func.octet_length(user_events.c.element),
        func.coalesce(func.octet_length(user_events.c.previous), literal_column("0")),
    )
    .where(user_events.c.position > _bigint("after"))
    .order_by(user_events.c.position)
    .limit(bindparam("limit", type_=Integer()))
)
_removed = (
    delete(user_events)
    .where(user_events.c.position > _bigint("after"), user_events.c.position <= _bigint("last"))
    .returning(*user_events.c)
    .cte("removed")
)
_packed = packed(_removed)
_segment = (
    select(
        func.min(_removed.c.position).label("first_position"),
        func.max(_removed.c.position).label("last_position"),
        func.min(_removed.c.commit_time).label("first_time"),
        func.max(_removed.c.commit_time).label("last_time"),
        *(column.label(name) for name, column in _packed.items()),
    )
    .having(func.count() == _bigint("last") - _bigint("after"))
    .subquery("segment")
)
_size = reduce(operator.add, (func.octet_length(_segment.c[name]) for name in _packed))
_SEAL = sql(
    insert(segments)
    .from_select([*_segment.c.keys(), "size"], select(*_segment.c, _size), include_defaults=False)
    .add_cte(_removed)
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is sealed, and when."""

    events: int
    """Events of a segment, unless a larger group begins in it or its parts become larger than a message."""
    unsealed: int
    """The newest events, that many, are not sealed before they are older than `span`."""
    span: timedelta
    """Time between the first and the last event of a segment at most."""


class Loose(NamedTuple):
    """An event that is not sealed; lengths of its element and of the user before, in bytes."""

    position: int
    group_end: bool
    commit_time: datetime
    element: int
    previous: int


def cut(loose: Sequence[Loose], rules: Rules, head: int, now: datetime) -> int | None:
    """The last position of the segment that the oldest loose events make; None while it is too early for one.

    They make one when it is full and the head is far, or when no event of the present would belong into it any more.
    """
    over = loose[0].commit_time + rules.span
    last, elements, previous = None, 0, 0
    for count, event in enumerate(loose, 1):
        elements += event.element
        previous += event.previous
        fits = count <= rules.events and max(elements, previous) <= LARGEST_MESSAGE and event.commit_time <= over
        if last is not None and not fits:
            break
        if event.group_end:
            last = event.position
            if count >= rules.events or not fits:
                break
    else:
        return last if now > over else None
    return last if now > over or last <= head - rules.unsealed else None


async def seal(connection: Connection, rules: Rules) -> int:
    """Makes one segment if one is due and nobody else is at it. Returns how many events went into it."""
    async with connection.transaction():
        # A statement's snapshot is older than the lock that it takes: the lock comes first, in a statement of its own.
        [mine] = await _one(connection, _TRY_LOCK)
        if not mine:
            return 0
        sealed, head, now = await _one(connection, _READ_STATE)
        limit = rules.events + MOST_IN_BATCH
        cursor = await connection.execute(_READ_LOOSE, {"after": sealed, "limit": limit}, binary=True)
        loose = [Loose(*row) for row in await cursor.fetchall()]
        last = cut(loose, rules, head, now) if loose else None
        if last is None:
            return 0
        cursor = await connection.execute(_SEAL, {"after": sealed, "last": last})
        if cursor.rowcount == 0:
            log.error("the log has a hole; nothing is sealed from there on", after=sealed, upto=last)
            raise psycopg.Rollback
        return last - loose[0].position + 1
    return 0


async def run(url: str, rules: Rules, interval: float) -> None:
    """A background loop: seals what is due, then waits for `interval` seconds."""
    delay = 0.05
    while True:
        tasks.beat()
        try:
            async with await database.connect(url, APPLICATION, **_SESSION) as connection:
                while True:
                    tasks.beat()
                    await _seal_all(connection, rules)
                    delay = 0.05
                    await asyncio.sleep(interval)
        # The server's time-outs are among the internal errors.
        except (psycopg.OperationalError, psycopg.InternalError) as error:
            log.warning("sealing is put off", error=str(error).strip(), retry_seconds=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LONGEST_RECONNECT)


async def _seal_all(connection: Connection, rules: Rules) -> None:
    loop = asyncio.get_running_loop()
    began, events = loop.time(), 0
    while count := await seal(connection, rules):
        tasks.beat()
        events += count
        # A log that was just filled may have millions to seal: Postgres is for its callers most of the time.
        await asyncio.sleep((loop.time() - began) * (1 - _SHARE) / _SHARE)
        began = loop.time()
    if events:
        log.debug("sealed", events=events)


async def _one(connection: Connection, statement: str) -> tuple[Any, ...]:
    cursor = await connection.execute(statement, binary=True)
    row = await cursor.fetchone()
    if row is None:
        raise LookupError("the feed's row is missing: the schema is not complete")
    return row
