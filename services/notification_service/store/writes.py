"""The SQL that stores notifications and deliveries: what a batch of events becomes with the cursor that has passed it,
and what no batch made.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    case,
    func,
    insert,
    literal_column,
    not_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from notification_service.domain import NOT_COMPOSED, USER_DELETED, Cursor, Notification, Result, State
from notification_service.store import feed, recipients
from notification_service.store.feed import Locked
from notification_service.store.parts import TIME, UUID, bind, number, rows
from notification_service.store.pending import cancellation
from notification_service.store.shards import is_divided
from notification_service.tables import attempts, contents, deliveries, inbox, notifications, shards
from servicekit import arrays
from servicekit.database import Connection, sql

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
_gone = rows(g_user_id=UUID, g_position=BigInteger())
_CANCEL_FOR_DELETED = sql(
    cancellation.where(
        deliveries.c.user_id == _gone.c.g_user_id,
        notifications.c.id == deliveries.c.notification_id,
        notifications.c.event_position < _gone.c.g_position,
    )
)


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
            await feed.lock_inbox(connection)
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
