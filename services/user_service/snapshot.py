"""A snapshot: every selected living user once, as events at one position of the log.

No transaction stays open over it. Users are read in pages by id, each page a statement of its own, so that a user may
be newer than the position: whoever then applies the events after the position by version arrives at what the table
holds. An open snapshot has a row that keeps those events from being removed, for a bounded time.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from psycopg.rows import TupleRow
from sqlalchemy import ARRAY, Integer, Interval, any_, bindparam, delete, func, insert, select
from sqlalchemy.dialects.postgresql import UUID

from servicekit import arrays
from servicekit.database import Connection, sql
from user_service import events, reads
from user_service.reads import USER_COLUMNS
from user_service.selection import Selection
from user_service.tables import feed, living, open_snapshots, users

# A user has up to 16 kB: what a stream holds of a page is bounded.
_PAGE = 250
_KEPT = timedelta(hours=1)

_UUID = UUID(as_uuid=True)
_LABELS = USER_COLUMNS.index(users.c.labels)

_OPEN = sql(
    insert(open_snapshots)
    .from_select(
        ["id", "position", "expire_time"],
        select(bindparam("id", type_=_UUID), feed.c.head_position, func.now() + bindparam("kept", type_=Interval())),
    )
    .returning(open_snapshots.c.position)
)
_CLOSE = sql(delete(open_snapshots).where(open_snapshots.c.id == bindparam("id", type_=_UUID)))

_page = select(*USER_COLUMNS).where(living).order_by(users.c.id)
_READ_FIRST = sql(_page.limit(bindparam("size", type_=Integer())))
_READ_NEXT = sql(_page.where(users.c.id > bindparam("after", type_=_UUID)).limit(bindparam("size", type_=Integer())))
_READ_CHOSEN = sql(_page.where(users.c.id == any_(bindparam("ids", type_=ARRAY(_UUID)))))

Reader = Callable[[], AbstractAsyncContextManager[Connection]]


class Opened(NamedTuple):
    """An open snapshot and its position."""

    id: uuid.UUID
    position: int


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of one message, none if nothing was selected; users up to the id `last` have been passed with it."""

    elements: list[bytes]
    last: bytes


async def begin(connection: Connection) -> Opened:
    """Opens a snapshot at the head of the log. What follows is retained until it is closed, an hour at most."""
    while True:
        snapshot = uuid.uuid4()
        cursor = await connection.execute(_OPEN, {"id": snapshot, "kept": _KEPT}, binary=True)
        row = await cursor.fetchone()
        if row is None:
            raise LookupError("the feed's row is missing: the schema is not complete")
        [position] = row
        # Events may have been removed by somebody who did not see the row yet.
        if (await reads.feed_state(connection)).earliest <= position + 1:
            return Opened(snapshot, position)
        await end(connection, snapshot)


async def end(connection: Connection, snapshot: uuid.UUID) -> None:
    """Closes a snapshot that was sent; one that is closed already may be closed again."""
    await connection.execute(_CLOSE, {"id": snapshot})


async def parts(
    reader: Reader, selection: Selection, position: int, after: bytes, max_batch: int
) -> AsyncGenerator[Part, None]:
    """The users after an id (empty: all) as SNAPSHOT events at a position, in the order of ids; one part for every page
    at least.
    """
    chosen = sorted(selection.user_ids)
    while True:
        async with reader() as connection:
            rows, last, is_end = await _read(connection, chosen, after)
        entries = [
            events.of_snapshot(reads.user_of(row), row[0].bytes, position)
            for row in rows
            if selection.has_user(row[0].bytes, row[_LABELS])
        ]
        while True:
            count = events.cut(entries[:max_batch], include_previous=False)
            part, entries = entries[:count], entries[count:]
            after = part[-1].user_id if entries else last
            yield Part(events.join(part, include_previous=False), after)
            if not entries:
                break
        if is_end:
            return


async def _read(connection: Connection, chosen: list[bytes], after: bytes) -> tuple[list[TupleRow], bytes, bool]:
    """The next page of living users, the id up to which it goes, and whether it is the last."""
    if chosen:
        start = bisect_right(chosen, after)
        ids = chosen[start : start + _PAGE]
        cursor = await connection.execute(_READ_CHOSEN, {"ids": arrays.ids(ids)}, binary=True)
        return await cursor.fetchall(), ids[-1] if ids else after, start + _PAGE >= len(chosen)
    if after:
        values = {"after": uuid.UUID(bytes=after), "size": _PAGE}
        cursor = await connection.execute(_READ_NEXT, values, binary=True)
    else:
        cursor = await connection.execute(_READ_FIRST, {"size": _PAGE}, binary=True)
    rows = await cursor.fetchall()
    return rows, rows[-1][0].bytes if rows else after, len(rows) < _PAGE
