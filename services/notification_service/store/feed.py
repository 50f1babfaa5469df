"""The SQL of following the feed: what a batch of events becomes is stored in one transaction with the cursor.

The row of a shard is always locked before that of the inbox.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    any_,
    case,
    func,
    insert,
    literal_column,
    not_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as insert_or_ignore

from notification_service.domain import NOT_COMPOSED, USER_DELETED, Cursor, Hold, Notification, Result, State
from notification_service.store import recipients
from notification_service.store.leases import cancellation
from notification_service.store.parts import TIME, UUID, bind, number, rows
from notification_service.store.shards import DIVIDED, is_divided
from notification_service.tables import attempts, contents, deliveries, inbox, notifications, shards
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

# The counters of notifications and deliveries rise in the statement that stores them, which is how long others wait for
# the inbox's row; then comes the commit. Either the cursor is in that row, too ...
_counted = {
    "notification_position": inbox.c.notification_position + bind("more_notifications", BigInteger()),
    "delivery_position": inbox.c.delivery_position + bind("more_deliveries", BigInteger()),
    "update_time": func.now(),
}
_whole = (
    update(inbox)
    .where(
        inbox.c.position == bind("was_position", BigInteger()),
        inbox.c.resume_token.is_not_distinct_from(bind("was_token", Text())),
    )
    .values(
        log_id=bind("log_id", UUID),
        resume_token=bind("resume_token", Text()),
        position=bind("position", BigInteger()),
        position_time=func.coalesce(bind("position_time", TIME), inbox.c.position_time),
        **_counted,
    )
    .returning(inbox.c.notification_position, inbox.c.delivery_position)
    .cte("moved")
)
_seen = (
    update(shards)
    .where(shards.c.shard == bind("shard", Integer()))
    .values(head_position=bind("head_position", BigInteger()), update_time=func.now())
    .cte("seen")
)
# ... or in that of a shard, which is locked already.
_counters = (
    update(inbox)
    .where(is_divided)
    .values(**_counted)
    .returning(inbox.c.notification_position, inbox.c.delivery_position)
    .cte("moved")
)
_move_shard = (
    update(shards)
    .where(shards.c.shard == bind("shard", Integer()))
    .values(
        log_id=bind("log_id", UUID),
        resume_token=bind("resume_token", Text()),
        position=bind("position", BigInteger()),
        position_time=func.coalesce(bind("position_time", TIME), shards.c.position_time),
        head_position=bind("head_position", BigInteger()),
        floors=bind("floors", JSONB()),
        update_time=func.now(),
    )
)

_note = rows(
    n_id=UUID,
    n_position=BigInteger(),
    n_user_id=UUID,
    n_event_id=UUID,
    n_event_position=BigInteger(),
    n_rule=Text(),
    n_category=Text(),
    n_template=Text(),
    n_channels=Text(),
    n_subject=Text(),
    n_body=Text(),
    n_trace_parent=Text(),
    n_trace_state=Text(),
    n_template_version=Text(),
    n_time_zone=Text(),
    n_locale=Text(),
    n_digest_id=UUID,
    n_send_id=UUID,
)
_sent = rows(
    d_id=UUID,
    d_position=BigInteger(),
    d_notification_id=UUID,
    d_user_id=UUID,
    d_event_id=UUID,
    d_channel=Text(),
    d_target=Text(),
    d_state=SmallInteger(),
    d_tries=Integer(),
    d_idempotency_key=Text(),
    d_trace_parent=Text(),
    d_trace_state=Text(),
    d_end_reason=Text(),
)
_is_open = _sent.c.d_state == number(State.PENDING)
_carried = rows(c_delivery_id=UUID, c_content=LargeBinary())
_failed = rows(f_delivery_id=UUID, f_detail=Text())


def _store(moved: Any, *moves: Any) -> str:
    """The statement that stores notifications and deliveries at the positions before the counters of `moved`, none if
    that has no row.
    """
    note = {"n_position": moved.c.notification_position + _note.c.n_position}
    note["n_channels"] = func.string_to_array(_note.c.n_channels, literal_column("','"))
    sent = {"d_position": moved.c.delivery_position + _sent.c.d_position}
    always: Any = literal_column("true")
    notes = insert(notifications).from_select(
        [*(column.name.removeprefix("n_") for column in _note.c), "create_time"],
        select(*(note.get(column.name, column) for column in _note.c), func.now()).join_from(moved, _note, always),
    )
    sents = insert(deliveries).from_select(
        [*(column.name.removeprefix("d_") for column in _sent.c), "create_time", "next_attempt_time", "end_time"],
        select(
            *(sent.get(column.name, column) for column in _sent.c),
            func.now(),
            case((_is_open, func.now())),
            case((not_(_is_open), func.now())),
        ).join_from(moved, _sent, always),
    )
    carried = insert(contents).from_select(
        ["delivery_id", "content"], select(*_carried.c).join_from(moved, _carried, always)
    )
    problems = insert(attempts).from_select(
        ["delivery_id", "number", "outcome", "detail", "start_time", "end_time"],
        select(
            _failed.c.f_delivery_id, number(1), number(Result.REFUSED), _failed.c.f_detail, func.now(), func.now()
        ).join_from(moved, _failed, always),
    )
    made = (notes.cte("notes"), sents.cte("sent"), carried.cte("carried"), problems.cte("problems"))
    return sql(select(moved).add_cte(*moves, *made))


_STORE_WHOLE = _store(_whole, _seen)
_STORE_SHARD = _store(_counters, _move_shard.cte("shard_moved"))
# What no batch made leaves the feed's place alone.
_STORE_MADE = _store(
    update(inbox)
    .values(**{name: _counted[name] for name in ("notification_position", "delivery_position")})
    .returning(inbox.c.notification_position, inbox.c.delivery_position)
    .cte("moved")
)
_MOVE_WHOLE = sql(select(_whole).add_cte(_seen))
_MOVE_SHARD = sql(_move_shard)
_RESET = sql(
    update(inbox).values(
        log_id=bind("log_id", UUID),
        resume_token=bind("resume_token", Text()),
        position=bind("position", BigInteger()),
        position_time=bind("position_time", TIME),
        update_time=func.now(),
    )
)


_gone = rows(g_user_id=UUID, g_position=BigInteger())
_CANCEL_FOR_DELETED = sql(
    cancellation.where(
        deliveries.c.user_id == _gone.c.g_user_id,
        notifications.c.id == deliveries.c.notification_id,
        notifications.c.event_position < _gone.c.g_position,
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


async def lock_place(connection: Connection) -> Cursor:
    """Begins a transaction in which nobody else can move the feed or a shard of it: the place, locked."""
    await connection.execute("BEGIN")
    found = await (await connection.execute(_LOCK_SHARDS)).fetchall()
    row = await (await connection.execute(_LOCK_CURSOR)).fetchone()
    if row is None:
        raise LookupError("the inbox has no row")
    cursor = Cursor(*row)
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
        row = await (await connection.execute(_LOCK_CURSOR)).fetchone()
        if row is None:
            raise LookupError("the inbox has no row")
        locked = Locked(Cursor(*row), None, row[1], row[2])
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


async def write_inbox(
    connection: Connection,
    locked: Locked,
    made: Sequence[Notification],
    after: Cursor,
    *,
    position_time: datetime | None,
    head_position: int,
    deleted: Mapping[uuid.UUID, recipients.Deletion],
) -> Cursor | None:
    """Stores notifications and deliveries, cancels what is pending for users that were deleted and was made of events
    before that position, marks them in the copy of the users, moves the cursor, and commits. Returns the cursor with
    its counters; None, with nothing committed, if the inbox's row has changed since the cursor was locked.
    """
    values: dict[str, Any] = {
        "log_id": after.log_id,
        "resume_token": after.resume_token,
        "position": after.position,
        "position_time": position_time,
        "head_position": head_position,
        "floors": json.dumps(after.floors) if after.floors else None,
        "shard": locked.hold.shard if locked.hold else None,
        "was_token": locked.inbox_token,
        "was_position": locked.inbox_position,
        "more_notifications": len(made),
        "more_deliveries": sum(len(one.deliveries) for one in made),
    }
    if made:
        values |= _notification_arrays(made) | _delivery_arrays(made)
    # One shard has its cursor in the inbox's row, as soon as it has passed what earlier divisions had.
    whole = locked.hold is None or (locked.hold.of == 1 and not after.floors)
    if whole or made:
        statement = (_STORE_WHOLE if made else _MOVE_WHOLE) if whole else _STORE_SHARD
        row = await (await connection.execute(statement, values)).fetchone()
        if row is None:
            return None
        after = replace(after, notification_position=row[0], delivery_position=row[1])
    else:
        await connection.execute(_MOVE_SHARD, values)
        if deleted:
            await connection.execute(_LOCK_CURSOR)
    if deleted:
        # Under the lock of the inbox's row, as whoever stores a send: either sees the mark, or what it made is here.
        await recipients.bury(connection, deleted)
        gone: dict[str, Any] = {
            "g_user_id": arrays.uuids(list(deleted)),
            "g_position": arrays.bigints([one.position for one in deleted.values()]),
            "reason": USER_DELETED,
        }
        await connection.execute(_CANCEL_FOR_DELETED, gone)
    await connection.execute("COMMIT")
    return after


async def write_made(connection: Connection, made: Sequence[Notification]) -> None:
    """Stores notifications and deliveries that no batch of events made, in the caller's transaction, which holds the
    lock of the inbox's row from then on.
    """
    values = {
        "more_notifications": len(made),
        "more_deliveries": sum(len(one.deliveries) for one in made),
        **_notification_arrays(made),
        **_delivery_arrays(made),
    }
    if await (await connection.execute(_STORE_MADE, values)).fetchone() is None:
        raise LookupError("the inbox has no row")


def _notification_arrays(made: Sequence[Notification]) -> dict[str, arrays.Array]:
    return {
        "n_id": arrays.uuids([one.id for one in made]),
        "n_position": arrays.bigints(range(1 - len(made), 1)),
        "n_user_id": arrays.uuids([one.user_id for one in made]),
        "n_event_id": arrays.uuids([one.event_id for one in made]),
        "n_event_position": arrays.bigints([one.event_position for one in made]),
        "n_rule": arrays.texts([one.rule for one in made]),
        "n_category": arrays.texts([one.category for one in made]),
        "n_template": arrays.texts([one.template for one in made]),
        "n_channels": arrays.texts([",".join(one.channels) for one in made]),
        "n_subject": arrays.texts([one.subject for one in made]),
        "n_body": arrays.texts([one.body for one in made]),
        "n_trace_parent": arrays.texts([one.trace_parent for one in made]),
        "n_trace_state": arrays.texts([one.trace_state for one in made]),
        "n_template_version": arrays.texts([one.template_version for one in made]),
        "n_time_zone": arrays.texts([one.time_zone for one in made]),
        "n_locale": arrays.texts([one.locale for one in made]),
        "n_digest_id": arrays.nullable_uuids([one.digest_id for one in made]),
        "n_send_id": arrays.nullable_uuids([one.send_id for one in made]),
    }


def _delivery_arrays(made: Sequence[Notification]) -> dict[str, arrays.Array]:
    sent = [(one, delivery) for one in made for delivery in one.deliveries]
    failed = [delivery for _, delivery in sent if delivery.problem]
    carried = [delivery for _, delivery in sent if not delivery.problem]
    return {
        "d_id": arrays.uuids([delivery.id for _, delivery in sent]),
        "d_position": arrays.bigints(range(1 - len(sent), 1)),
        "d_notification_id": arrays.uuids([one.id for one, _ in sent]),
        "d_user_id": arrays.uuids([one.user_id for one, _ in sent]),
        "d_event_id": arrays.uuids([one.event_id for one, _ in sent]),
        "d_channel": arrays.texts([delivery.channel for _, delivery in sent]),
        "d_target": arrays.texts([delivery.target for _, delivery in sent]),
        "d_state": arrays.smallints([State.PARKED if delivery.problem else State.PENDING for _, delivery in sent]),
        "d_tries": arrays.integers([1 if delivery.problem else 0 for _, delivery in sent]),
        "d_idempotency_key": arrays.texts([delivery.idempotency_key for _, delivery in sent]),
        "d_trace_parent": arrays.texts([one.trace_parent for one, _ in sent]),
        "d_trace_state": arrays.texts([one.trace_state for one, _ in sent]),
        "d_end_reason": arrays.texts([NOT_COMPOSED if delivery.problem else "" for _, delivery in sent]),
        "c_delivery_id": arrays.uuids([delivery.id for delivery in carried]),
        "c_content": arrays.byteas([delivery.content for delivery in carried]),
        "f_delivery_id": arrays.uuids([delivery.id for delivery in failed]),
        "f_detail": arrays.texts([delivery.problem for delivery in failed]),
    }
