"""The SQL that changes something: the inbox's transaction, leases, outcomes.

Statements are built by SQLAlchemy Core, compiled at import, and run by psycopg once for many rows, with arrays. All
times are the database's: replicas need not agree on a clock.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    any_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    not_,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.dialects.postgresql import insert as insert_or_ignore
from sqlalchemy.sql.type_api import TypeEngine

from notification_service.domain import Cursor, Ended, Leased, Notification, Result, State
from notification_service.tables import attempts, contents, deliveries, inbox, notifications
from servicekit import arrays
from servicekit.database import Connection, sql

_TIME = DateTime(timezone=True)
_UUID = UUID(as_uuid=True)

# What replicas that subscribe hold: a session lock of the notifications database.
_SUBSCRIBER_LOCK = 0x7469_6469_6E67_7301


def _bind(name: str, kind: TypeEngine[Any]) -> Any:
    return bindparam(name, type_=kind)


def _rows(**columns: TypeEngine[Any]) -> Any:
    """A table made of one array parameter per column."""
    parameters = [_bind(name, ARRAY(kind)) for name, kind in columns.items()]
    return func.unnest(*parameters).table_valued(*columns).render_derived()


def _number(value: int) -> Any:
    return literal_column(str(value))


_SECOND: Any = literal_column("interval '1 second'")
_MILLISECOND: Any = literal_column("interval '1 millisecond'")

# The inbox

_ENSURE_INBOX = sql(insert_or_ignore(inbox).values(id=_number(1)).on_conflict_do_nothing())
_CURSOR_COLUMNS = (
    inbox.c.log_id,
    inbox.c.resume_token,
    inbox.c.position,
    inbox.c.notification_position,
    inbox.c.delivery_position,
)
_READ_CURSOR = sql(select(*_CURSOR_COLUMNS))
_LOCK_CURSOR = sql(select(*_CURSOR_COLUMNS).with_for_update())
_READ_KNOWN = sql(select(notifications.c.id).where(notifications.c.id == any_(_bind("ids", ARRAY(_UUID)))))
_READ_SILENCE = sql(select(func.extract("epoch", func.now() - inbox.c.update_time)))

_note = _rows(
    n_id=_UUID,
    n_position=BigInteger(),
    n_user_id=_UUID,
    n_event_id=_UUID,
    n_event_position=BigInteger(),
    n_rule=Text(),
    n_category=Text(),
    n_template=Text(),
    n_channels=Text(),
    n_subject=Text(),
    n_body=Text(),
    n_trace_parent=Text(),
    n_trace_state=Text(),
)
_insert_notifications = insert(notifications).from_select(
    [*(column.name.removeprefix("n_") for column in _note.c), "create_time"],
    select(
        *(
            func.string_to_array(column, literal_column("','")) if column.name == "n_channels" else column
            for column in _note.c
        ),
        func.now(),
    ),
)
_sent = _rows(
    d_id=_UUID,
    d_position=BigInteger(),
    d_notification_id=_UUID,
    d_user_id=_UUID,
    d_event_id=_UUID,
    d_channel=Text(),
    d_target=Text(),
    d_state=SmallInteger(),
    d_tries=Integer(),
    d_idempotency_key=Text(),
    d_trace_parent=Text(),
    d_trace_state=Text(),
)
_is_open = _sent.c.d_state == _number(State.PENDING)
_insert_deliveries = insert(deliveries).from_select(
    [*(column.name.removeprefix("d_") for column in _sent.c), "create_time", "next_attempt_time", "end_time"],
    select(*_sent.c, func.now(), case((_is_open, func.now())), case((not_(_is_open), func.now()))),
)
_carried = _rows(c_delivery_id=_UUID, c_content=LargeBinary())
_insert_contents = insert(contents).from_select(["delivery_id", "content"], select(*_carried.c))
_failed = _rows(f_delivery_id=_UUID, f_detail=Text())
_insert_problems = insert(attempts).from_select(
    ["delivery_id", "number", "outcome", "detail", "start_time", "end_time"],
    select(_failed.c.f_delivery_id, _number(1), _number(Result.REFUSED), _failed.c.f_detail, func.now(), func.now()),
)
_move_cursor = update(inbox).values(
    log_id=_bind("log_id", _UUID),
    resume_token=_bind("resume_token", Text()),
    position=_bind("position", BigInteger()),
    position_time=func.coalesce(_bind("position_time", _TIME), inbox.c.position_time),
    notification_position=_bind("notification_position", BigInteger()),
    delivery_position=_bind("delivery_position", BigInteger()),
    update_time=func.now(),
)
_MOVE_CURSOR = sql(_move_cursor)
_WRITE_INBOX = sql(
    _move_cursor.add_cte(
        _insert_notifications.cte("notes"),
        _insert_deliveries.cte("sent"),
        _insert_contents.cte("carried"),
        _insert_problems.cte("problems"),
    )
)


async def try_subscribe(connection: Connection) -> bool:
    """Whether this session may be the one that subscribes; it stays so until the session ends."""
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%(key)s)", {"key": _SUBSCRIBER_LOCK})
    row = await cursor.fetchone()
    return bool(row and row[0])


async def silence(connection: Connection) -> float:
    """For how long no subscriber has stored anything, seconds."""
    cursor = await connection.execute(_READ_SILENCE)
    row = await cursor.fetchone()
    return float(row[0]) if row else 0.0


async def read_cursor(connection: Connection) -> Cursor:
    """The cursor; made if there is none yet."""
    row = await (await connection.execute(_READ_CURSOR)).fetchone()
    if row is None:
        await connection.execute(_ENSURE_INBOX)
        row = await (await connection.execute(_READ_CURSOR)).fetchone()
    if row is None:
        raise LookupError("the inbox has no row")
    return Cursor(*row)


async def lock_cursor(connection: Connection, ids: Sequence[uuid.UUID]) -> tuple[Cursor, set[uuid.UUID]]:
    """Begins the inbox's transaction: the cursor, locked, and which of the notifications `ids` exist already."""
    known: set[uuid.UUID] = set()
    # No pipeline, here and at the end of the transaction: what psycopg sends after one disarms the server's
    # idle_in_transaction_session_timeout, and a process paused then would hold the cursor until it goes on.
    await connection.execute("BEGIN")
    row = await (await connection.execute(_LOCK_CURSOR)).fetchone()
    if row is None:
        raise LookupError("the inbox has no row")
    # A statement's snapshot is older than the lock it waits for: what exists is read by the next one.
    if ids:
        found = await connection.execute(_READ_KNOWN, {"ids": arrays.uuids(ids)})
        known = {identity for (identity,) in await found.fetchall()}
    return Cursor(*row), known


async def write_inbox(
    connection: Connection, made: Sequence[Notification], before: Cursor, after: Cursor, position_time: datetime | None
) -> None:
    """Stores notifications and deliveries, moves the cursor, and commits."""
    values: dict[str, Any] = {
        "log_id": after.log_id,
        "resume_token": after.resume_token,
        "position": after.position,
        "position_time": position_time,
        "notification_position": after.notification_position,
        "delivery_position": after.delivery_position,
    }
    if made:
        values |= _notification_arrays(made, before.notification_position + 1)
        values |= _delivery_arrays(made, before.delivery_position + 1)
    await connection.execute(_WRITE_INBOX if made else _MOVE_CURSOR, values)
    await connection.execute("COMMIT")


def _notification_arrays(made: Sequence[Notification], first: int) -> dict[str, arrays.Array]:
    return {
        "n_id": arrays.uuids([one.id for one in made]),
        "n_position": arrays.bigints(range(first, first + len(made))),
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
    }


def _delivery_arrays(made: Sequence[Notification], first: int) -> dict[str, arrays.Array]:
    rows = [(one, delivery) for one in made for delivery in one.deliveries]
    failed = [delivery for _, delivery in rows if delivery.problem]
    carried = [delivery for _, delivery in rows if not delivery.problem]
    return {
        "d_id": arrays.uuids([delivery.id for _, delivery in rows]),
        "d_position": arrays.bigints(range(first, first + len(rows))),
        "d_notification_id": arrays.uuids([one.id for one, _ in rows]),
        "d_user_id": arrays.uuids([one.user_id for one, _ in rows]),
        "d_event_id": arrays.uuids([one.event_id for one, _ in rows]),
        "d_channel": arrays.texts([delivery.channel for _, delivery in rows]),
        "d_target": arrays.texts([delivery.target for _, delivery in rows]),
        "d_state": arrays.smallints([State.PARKED if delivery.problem else State.PENDING for _, delivery in rows]),
        "d_tries": arrays.integers([1 if delivery.problem else 0 for _, delivery in rows]),
        "d_idempotency_key": arrays.texts([delivery.idempotency_key for _, delivery in rows]),
        "d_trace_parent": arrays.texts([one.trace_parent for one, _ in rows]),
        "d_trace_state": arrays.texts([one.trace_state for one, _ in rows]),
        "c_delivery_id": arrays.uuids([delivery.id for delivery in carried]),
        "c_content": arrays.byteas([delivery.content for delivery in carried]),
        "f_delivery_id": arrays.uuids([delivery.id for delivery in failed]),
        "f_detail": arrays.texts([delivery.problem for delivery in failed]),
    }


# Deliveries

_is_pending = deliveries.c.state == _number(State.PENDING)
_is_free = or_(deliveries.c.lease_until.is_(None), deliveries.c.lease_until <= func.now())
_turns = deliveries.c.tries - deliveries.c.tries_before
_max_tries = _bind("max_tries", Integer())

_due = (
    select(deliveries.c.id)
    .where(
        _is_pending,
        deliveries.c.channel == _bind("channel", Text()),
        deliveries.c.next_attempt_time <= func.now(),
        _is_free,
        _turns < _max_tries,
        not_(deliveries.c.id == any_(_bind("busy", ARRAY(_UUID)))),
    )
    .order_by(deliveries.c.next_attempt_time)
    .limit(_bind("most", Integer()))
    .with_for_update(skip_locked=True)
    .cte("due")
)
_leased = (
    update(deliveries)
    .where(deliveries.c.id == _due.c.id)
    .values(tries=deliveries.c.tries + _number(1), lease_until=func.now() + _bind("lease", Float()) * _SECOND)
    .returning(
        deliveries.c.id,
        deliveries.c.tries,
        deliveries.c.channel,
        deliveries.c.target,
        deliveries.c.idempotency_key,
        deliveries.c.create_time,
        deliveries.c.trace_parent,
        deliveries.c.trace_state,
        deliveries.c.event_id,
        deliveries.c.tries_before,
        deliveries.c.position,
    )
    .cte("leased")
)
_begun = (
    insert(attempts)
    .from_select(["delivery_id", "number", "start_time"], select(_leased.c.id, _leased.c.tries, func.now()))
    .cte("begun")
)
_LEASE = sql(
    select(
        _leased.c.id,
        _leased.c.tries,
        _leased.c.channel,
        _leased.c.target,
        _leased.c.idempotency_key,
        contents.c.content,
        _leased.c.create_time,
        _leased.c.trace_parent,
        _leased.c.trace_state,
        _leased.c.event_id,
        _leased.c.tries_before,
    )
    .join(contents, contents.c.delivery_id == _leased.c.id)
    .order_by(_leased.c.position)
    .add_cte(_begun)
)

_PARK_EXHAUSTED = sql(
    update(deliveries)
    .where(_is_pending, deliveries.c.next_attempt_time <= func.now(), _is_free, _turns >= _max_tries)
    .values(state=_number(State.PARKED), next_attempt_time=null(), lease_until=null(), end_time=func.now())
    .returning(deliveries.c.id)
)

_end = _rows(
    e_id=_UUID,
    e_number=Integer(),
    e_outcome=SmallInteger(),
    e_code=Integer(),
    e_detail=Text(),
    e_state=SmallInteger(),
    e_delay=Integer(),
)
_goes_on = _end.c.e_state == _number(State.PENDING)
_fenced = (
    update(deliveries)
    # An attempt from before a replay has lost its lease, too: it would park what is to be tried again.
    .where(
        deliveries.c.id == _end.c.e_id,
        deliveries.c.tries == _end.c.e_number,
        deliveries.c.tries_before < _end.c.e_number,
        _is_pending,
    )
    .values(
        state=_end.c.e_state,
        lease_until=null(),
        next_attempt_time=case((_goes_on, func.now() + _end.c.e_delay * _MILLISECOND)),
        end_time=case((not_(_goes_on), func.now())),
    )
    .returning(deliveries.c.id, _end.c.e_number, _end.c.e_outcome, _end.c.e_code, _end.c.e_detail)
    .cte("fenced")
)
_RECORD = sql(
    update(attempts)
    .where(attempts.c.delivery_id == _fenced.c.id, attempts.c.number == _fenced.c.e_number)
    .values(outcome=_fenced.c.e_outcome, code=_fenced.c.e_code, detail=_fenced.c.e_detail, end_time=func.now())
    .returning(attempts.c.delivery_id)
)


async def lease(
    connection: Connection, channel: str, most: int, *, seconds: float, max_tries: int, busy: Sequence[uuid.UUID]
) -> list[Leased]:
    """Takes at most `most` due deliveries of a channel, and records that an attempt of each begins."""
    values = {
        "channel": channel,
        "most": most,
        "lease": seconds,
        "max_tries": max_tries,
        "busy": arrays.uuids(busy),
    }
    cursor = await connection.execute(_LEASE, values, binary=True)
    return [Leased(*row) for row in await cursor.fetchall()]


async def record(connection: Connection, ended: Sequence[Ended]) -> set[uuid.UUID]:
    """Records how attempts ended. Returns those whose lease was still held; of the others nothing is written."""
    values = {
        "e_id": arrays.uuids([one.id for one in ended]),
        "e_number": arrays.integers([one.number for one in ended]),
        "e_outcome": arrays.smallints([one.result for one in ended]),
        "e_code": arrays.integers([one.code for one in ended]),
        "e_detail": arrays.texts([one.detail for one in ended]),
        "e_state": arrays.smallints([one.state for one in ended]),
        "e_delay": arrays.integers([int(one.delay * 1000) for one in ended]),
    }
    cursor = await connection.execute(_RECORD, values, binary=True)
    return {identity for (identity,) in await cursor.fetchall()}


async def park_exhausted(connection: Connection, max_tries: int) -> list[uuid.UUID]:
    """Parks deliveries whose every attempt ended without an answer: whoever made the last one died over it."""
    cursor = await connection.execute(_PARK_EXHAUSTED, {"max_tries": max_tries})
    return [identity for (identity,) in await cursor.fetchall()]
