"""The SQL of following the feed: where it is, whose that is, and the locks under which it moves.

The row of a shard is always locked before that of the inbox.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Integer, Text, any_, case, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert as insert_or_ignore

from notification_service.domain import Cursor, Hold
from notification_service.store.parts import TIME, UUID, bind, number
from notification_service.store.shards import DIVIDED, is_divided
from notification_service.tables import inbox, notifications, shards
from servicekit import arrays
from servicekit.database import Connection, sql

_ENSURE_INBOX = sql(insert_or_ignore(inbox).values(id=number(1)).on_conflict_do_nothing())
_CURSOR_COLUMNS = (
    inbox.c.log_id,
    inbox.c.resume_token,
    inbox.c.position,
    inbox.c.notification_position,
    inbox.c.delivery_position,
)
_READ_CURSOR = sql(select(*_CURSOR_COLUMNS))
_LOCK_CURSOR = sql(select(*_CURSOR_COLUMNS).with_for_update())
_NULL: Any = literal_column("NULL")
# A shard's cursor; no row if the hold on it is over, or nobody is to store by it before the feed is divided anew.
_read_shard = (
    select(
        case((is_divided, shards.c.log_id), else_=inbox.c.log_id),
        case((is_divided, shards.c.resume_token), else_=inbox.c.resume_token),
        case((is_divided, shards.c.position), else_=inbox.c.position),
        inbox.c.notification_position,
        inbox.c.delivery_position,
        case((is_divided, shards.c.floors), else_=_NULL),
        case((is_divided & shards.c.resume_token.is_(None), shards.c.position_time), else_=_NULL),
        inbox.c.resume_token,
        inbox.c.position,
    )
    .select_from(shards.join(inbox, literal_column("true")))
    .where(
        shards.c.shard == bind("shard", Integer()),
        shards.c.owner == bind("owner", UUID),
        shards.c.epoch == bind("epoch", BigInteger()),
        is_divided | (shards.c.of == number(1)),
    )
)
_READ_SHARD = sql(_read_shard)
_LOCK_SHARD = sql(_read_shard.with_for_update(of=shards))
_LOCK_SHARDS = sql(select(shards.c.position, shards.c.log_id).order_by(shards.c.shard).with_for_update())
_READ_PLACES = sql(select(shards.c.position, shards.c.log_id).order_by(shards.c.shard))
_READ_KNOWN = sql(select(notifications.c.id).where(notifications.c.id == any_(bind("ids", ARRAY(UUID)))))
_READ_SILENCE = sql(select(func.extract("epoch", func.now() - inbox.c.update_time)))

_RESET = sql(
    update(inbox).values(
        log_id=bind("log_id", UUID),
        resume_token=bind("resume_token", Text()),
        position=bind("position", BigInteger()),
        position_time=bind("position_time", TIME),
        update_time=func.now(),
    )
)


@dataclass(frozen=True, slots=True)
class Locked:
    """A cursor whose row is locked, and what the inbox's row says of the feed."""

    cursor: Cursor
    hold: Hold | None
    inbox_token: str | None
    inbox_position: int


async def silence(connection: Connection) -> float:
    """For how long no subscriber has stored anything, seconds."""
    cursor = await connection.execute(_READ_SILENCE)
    row = await cursor.fetchone()
    return float(row[0]) if row else 0.0


async def read_cursor(connection: Connection) -> Cursor:
    """The cursor of the undivided feed; made if there is none yet."""
    row = await (await connection.execute(_READ_CURSOR)).fetchone()
    if row is None:
        await connection.execute(_ENSURE_INBOX)
        row = await (await connection.execute(_READ_CURSOR)).fetchone()
    if row is None:
        raise LookupError("the inbox has no row")
    return Cursor(*row)


async def read_place(connection: Connection) -> Cursor:
    """How far the whole feed is processed: of shards that of the last. Their token is then none of the feed's."""
    cursor = await read_cursor(connection)
    if cursor.resume_token != DIVIDED:
        return cursor
    return _lowest(cursor, await (await connection.execute(_READ_PLACES)).fetchall())


async def lock_inbox(connection: Connection) -> tuple[Any, ...]:
    """Locks the inbox's row until the transaction ends; what a Cursor is made of."""
    row = await (await connection.execute(_LOCK_CURSOR)).fetchone()
    if row is None:
        raise LookupError("the inbox has no row")
    return row


async def lock_place(connection: Connection) -> Cursor:
    """Begins a transaction in which nobody else can move the feed or a shard of it: the place, locked."""
    await connection.execute("BEGIN")
    found = await (await connection.execute(_LOCK_SHARDS)).fetchall()
    cursor = Cursor(*await lock_inbox(connection))
    return _lowest(cursor, found) if cursor.resume_token == DIVIDED else cursor


def _lowest(cursor: Cursor, found: Sequence[tuple[Any, ...]]) -> Cursor:
    position = min((position for position, _ in found), default=cursor.position)
    log_id = next((log_id for _, log_id in found if log_id is not None), None)
    return replace(cursor, log_id=log_id, position=position)


async def reset(connection: Connection, after: Cursor, time: datetime | None) -> None:
    """Ends the transaction of `lock_place`: the feed goes on from a cursor, undivided until replicas divide it again.
    `time` is that of an event at or before its position.
    """
    values = {
        "log_id": after.log_id,
        "resume_token": after.resume_token,
        "position": after.position,
        "position_time": time,
    }
    await connection.execute(_RESET, values)
    await connection.execute("COMMIT")


async def read_shard(connection: Connection, hold: Hold) -> Cursor | None:
    """The cursor of a shard; None if the hold on it is over."""
    row = await (await connection.execute(_READ_SHARD, _held(hold))).fetchone()
    return None if row is None else _shard_cursor(row)


def _held(hold: Hold) -> dict[str, Any]:
    return {"shard": hold.shard, "owner": hold.owner, "epoch": hold.epoch}


def _shard_cursor(row: tuple[Any, ...]) -> Cursor:
    log_id, token, position, notes, sent, floors, since, *_ = row
    return Cursor(log_id, token, position, notes, sent, tuple(tuple(floor) for floor in floors or ()), since)


async def lock_cursor(
    connection: Connection, ids: Sequence[uuid.UUID], hold: Hold | None = None
) -> tuple[Locked | None, set[uuid.UUID]]:
    """Begins the inbox's transaction: the cursor of a shard, or of the undivided feed, locked, and which of the
    notifications `ids` exist already. The cursor is None if the hold on the shard is over.
    """
    known: set[uuid.UUID] = set()
    # No pipeline, here and at the end of the transaction: what psycopg sends after one disarms the server's
    # idle_in_transaction_session_timeout, and a process paused then would hold the cursor until it goes on.
    await connection.execute("BEGIN")
    if hold is None:
        at = Cursor(*await lock_inbox(connection))
        locked = Locked(at, None, at.resume_token, at.position)
    else:
        row = await (await connection.execute(_LOCK_SHARD, _held(hold))).fetchone()
        if row is None:
            return None, known
        locked = Locked(_shard_cursor(row), hold, row[-2], row[-1])
    # A statement's snapshot is older than the lock it waits for: what exists is read by the next one. Only who has the
    # shard of an event can have stored what was made of it.
    if ids:
        found = await connection.execute(_READ_KNOWN, {"ids": arrays.uuids(ids)})
        known = {identity for (identity,) in await found.fetchall()}
    return locked, known
