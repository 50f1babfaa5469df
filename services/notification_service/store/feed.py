"""The SQL of following the feed: what a batch of events becomes is stored in one transaction with the cursor."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
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
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as insert_or_ignore

from notification_service.domain import NOT_COMPOSED, USER_DELETED, Cursor, Notification, Result, State
from notification_service.store.parts import TIME, UUID, bind, number, rows
from notification_service.tables import attempts, contents, deliveries, inbox, notifications
from servicekit import arrays
from servicekit.database import Connection, sql

# What replicas that subscribe hold: a session lock of the notifications database.
_SUBSCRIBER_LOCK = 0x7469_6469_6E67_7301


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
_READ_KNOWN = sql(select(notifications.c.id).where(notifications.c.id == any_(bind("ids", ARRAY(UUID)))))
_READ_SILENCE = sql(select(func.extract("epoch", func.now() - inbox.c.update_time)))

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
_insert_deliveries = insert(deliveries).from_select(
    [*(column.name.removeprefix("d_") for column in _sent.c), "create_time", "next_attempt_time", "end_time"],
    select(*_sent.c, func.now(), case((_is_open, func.now())), case((not_(_is_open), func.now()))),
)
_carried = rows(c_delivery_id=UUID, c_content=LargeBinary())
_insert_contents = insert(contents).from_select(["delivery_id", "content"], select(*_carried.c))
_failed = rows(f_delivery_id=UUID, f_detail=Text())
_insert_problems = insert(attempts).from_select(
    ["delivery_id", "number", "outcome", "detail", "start_time", "end_time"],
    select(_failed.c.f_delivery_id, number(1), number(Result.REFUSED), _failed.c.f_detail, func.now(), func.now()),
)
_move_cursor = update(inbox).values(
    log_id=bind("log_id", UUID),
    resume_token=bind("resume_token", Text()),
    position=bind("position", BigInteger()),
    position_time=func.coalesce(bind("position_time", TIME), inbox.c.position_time),
    notification_position=bind("notification_position", BigInteger()),
    delivery_position=bind("delivery_position", BigInteger()),
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


_gone = rows(g_user_id=UUID, g_position=BigInteger())
# What is on its way just now goes on: its outcome says more than a cancellation would.
_CANCEL_FOR_DELETED = sql(
    update(deliveries)
    .where(
        deliveries.c.user_id == _gone.c.g_user_id,
        deliveries.c.state == number(State.PENDING),
        or_(deliveries.c.lease_until.is_(None), deliveries.c.lease_until <= func.now()),
        notifications.c.id == deliveries.c.notification_id,
        notifications.c.event_position < _gone.c.g_position,
    )
    .values(
        state=number(State.CANCELLED),
        behind=null(),
        next_attempt_time=null(),
        end_time=func.now(),
        end_reason=bind("reason", Text()),
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
    connection: Connection,
    made: Sequence[Notification],
    before: Cursor,
    after: Cursor,
    position_time: datetime | None,
    deleted: Mapping[uuid.UUID, int],
) -> None:
    """Stores notifications and deliveries, cancels what is pending for users that were deleted and was made of events
    before that position, moves the cursor, and commits.
    """
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
    if deleted:
        gone: dict[str, Any] = {
            "g_user_id": arrays.uuids(list(deleted)),
            "g_position": arrays.bigints(list(deleted.values())),
            "reason": USER_DELETED,
        }
        await connection.execute(_CANCEL_FOR_DELETED, gone)
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
        "n_template_version": arrays.texts([one.template_version for one in made]),
        "n_time_zone": arrays.texts([one.time_zone for one in made]),
        "n_locale": arrays.texts([one.locale for one in made]),
    }


def _delivery_arrays(made: Sequence[Notification], first: int) -> dict[str, arrays.Array]:
    sent = [(one, delivery) for one in made for delivery in one.deliveries]
    failed = [delivery for _, delivery in sent if delivery.problem]
    carried = [delivery for _, delivery in sent if not delivery.problem]
    return {
        "d_id": arrays.uuids([delivery.id for _, delivery in sent]),
        "d_position": arrays.bigints(range(first, first + len(sent))),
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
