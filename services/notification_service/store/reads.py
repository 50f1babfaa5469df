"""The SQL that only reads: lists, the tail of the notifications, the state of the inbox.

Each filter of a list is served by an index, each page is one statement. A list with other filters is another
statement, made once: a condition that may be absent would spoil the plan.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Text,
    Uuid,
    any_,
    bindparam,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from notification_service.domain import IN_APP, stamp
from notification_service.gate import Reason
from notification_service.store.parts import number
from notification_service.tables import (
    attempts,
    deliveries,
    delivery_decisions,
    delivery_operations,
    inbox,
    notifications,
)
from servicekit.database import Connection, sql
from tidings.notifications.v1 import notifications_pb2

_note, _delivery, _attempt = notifications.c, deliveries.c, attempts.c
_operation, _decision = delivery_operations.c, delivery_decisions.c

NOTIFICATION_COLUMNS = (
    _note.id,
    _note.position,
    _note.user_id,
    _note.event_id,
    _note.event_position,
    _note.rule,
    _note.category,
    _note.template,
    _note.channels,
    _note.subject,
    _note.body,
    _note.create_time,
    _note.trace_parent,
    _note.trace_state,
    _note.seen_time,
    _note.read_time,
    _note.archive_time,
    _note.template_version,
    _note.locale,
    _note.send_id,
    _note.digest_id,
)
_DELIVERY_COLUMNS = (
    _delivery.position,
    _delivery.id,
    _delivery.notification_id,
    _delivery.user_id,
    _delivery.event_id,
    _delivery.channel,
    _delivery.target,
    _delivery.state,
    _delivery.idempotency_key,
    _delivery.create_time,
    _delivery.next_attempt_time,
    _delivery.end_time,
    _delivery.trace_parent,
    _delivery.end_reason,
    _delivery.behind,
)
_ATTEMPT_COLUMNS = (
    _attempt.number,
    _attempt.outcome,
    _attempt.code,
    _attempt.detail,
    _attempt.start_time,
    _attempt.end_time,
    _attempt.provider,
)

# What was done to a delivery by hand, oldest first, as one value; null if nothing was, as for nearly all of them.
_OPERATIONS = (
    select(
        func.jsonb_agg(
            aggregate_order_by(
                func.jsonb_build_array(_operation.kind, _operation.actor, _operation.reason, _operation.time),
                _operation.id,
            )
        )
    )
    .where(_operation.delivery_id == _delivery.id)
    .scalar_subquery()
)

# What was decided about it when it was due, oldest first, likewise.
_DECISIONS = (
    select(
        func.jsonb_agg(
            aggregate_order_by(func.jsonb_build_array(_decision.kind, _decision.detail, _decision.time), _decision.id)
        )
    )
    .where(_decision.delivery_id == _delivery.id)
    .scalar_subquery()
)

_BEFORE = bindparam("before", type_=BigInteger)
_LIMIT = bindparam("most", type_=Integer)


def _filtered(statement: Select[Any], columns: Any, names: frozenset[str]) -> Select[Any]:
    kinds = {name: columns[name].type for name in names}
    return statement.where(*(columns[name] == bindparam(name, type_=kinds[name]) for name in sorted(names)))


@cache
def _list_notifications(names: frozenset[str]) -> str:
    statement = select(*NOTIFICATION_COLUMNS).where(_note.position < _BEFORE)
    return sql(_filtered(statement, _note, names).order_by(_note.position.desc()).limit(_LIMIT))


@cache
def _list_deliveries(names: frozenset[str], state: int | None) -> str:
    statement = select(*_DELIVERY_COLUMNS, _OPERATIONS.label("operations"), _DECISIONS.label("decisions")).where(
        _delivery.position < _BEFORE
    )
    if state is not None:
        # Written out: a parameter could not be told to be within what a partial index has.
        statement = statement.where(_delivery.state == number(state))
    page = _filtered(statement, _delivery, names).order_by(_delivery.position.desc()).limit(_LIMIT).subquery("page")
    return sql(
        select(page, *_ATTEMPT_COLUMNS)
        .outerjoin_from(page, attempts, _attempt.delivery_id == page.c.id)
        .order_by(page.c.position.desc(), _attempt.number)
    )


@cache
def _tail(of_one_user: bool) -> str:
    statement = select(*NOTIFICATION_COLUMNS).where(
        _note.position > bindparam("after", type_=BigInteger),
        _note.position <= bindparam("upto", type_=BigInteger),
        bindparam("channel", type_=Text) == any_(_note.channels),
    )
    if of_one_user:
        statement = statement.where(_note.user_id == bindparam("user_id", type_=Uuid))
    return sql(statement.order_by(_note.position).limit(_LIMIT))


_HEAD = sql(select(inbox.c.notification_position))
_LOG = sql(select(inbox.c.notification_log_id, inbox.c.notification_position))


def notification(row: tuple[Any, ...]) -> notifications_pb2.Notification:
    """The message of a row of NOTIFICATION_COLUMNS."""
    identity, position, user_id, event_id, event_position, rule, category, template, channels, *rest = row
    subject, body, create_time, trace_parent, trace_state, *marks, template_version, locale, send_id, digest_id = rest
    seen_time, read_time, archive_time = marks
    return notifications_pb2.Notification(
        id=str(identity),
        position=position,
        user_id=str(user_id),
        # What a caller sent has no event.
        event_id="" if send_id else str(event_id),
        event_position=0 if send_id else event_position,
        rule=rule,
        category=category,
        template=template,
        channels=channels,
        subject=subject,
        body=body,
        create_time=stamp(create_time),
        trace_parent=trace_parent,
        trace_state=trace_state,
        seen_time=stamp(seen_time),
        read_time=stamp(read_time),
        archive_time=stamp(archive_time),
        template_version=template_version,
        locale=locale,
        send_id=str(send_id) if send_id else "",
        digest_id=str(digest_id) if digest_id else "",
    )


def _attempt_of(row: tuple[Any, ...]) -> notifications_pb2.Delivery.Attempt:
    number, outcome, code, detail, start_time, end_time, provider = row
    return notifications_pb2.Delivery.Attempt(
        number=number,
        outcome=outcome,
        code=code,
        detail=detail,
        start_time=stamp(start_time),
        end_time=stamp(end_time),
        provider=provider,
    )


def _operation_of(done: list[Any]) -> notifications_pb2.Delivery.Operation:
    kind, actor, reason, time = done
    return notifications_pb2.Delivery.Operation(
        kind=kind, actor=actor, reason=reason, time=stamp(datetime.fromisoformat(time))
    )


def _decision_of(made: list[Any]) -> notifications_pb2.Delivery.Decision:
    kind, detail, time = made
    return notifications_pb2.Delivery.Decision(
        reason=Reason(kind).name, detail=detail, time=stamp(datetime.fromisoformat(time))
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """A delivery and its place in the list."""

    position: int
    delivery: notifications_pb2.Delivery


async def list_notifications(
    connection: Connection, filters: Mapping[str, Any], before: int, most: int
) -> list[notifications_pb2.Notification]:
    """Notifications below a position, newest first; filters are by column."""
    statement = _list_notifications(frozenset(filters))
    cursor = await connection.execute(statement, {**filters, "before": before, "most": most}, binary=True)
    return [notification(row) for row in await cursor.fetchall()]


async def list_deliveries(connection: Connection, filters: Mapping[str, Any], before: int, most: int) -> list[Listed]:
    """Deliveries below a position with all their attempts, newest first; filters are by column."""
    bound = {name: value for name, value in filters.items() if name != "state"}
    statement = _list_deliveries(frozenset(bound), filters.get("state"))
    cursor = await connection.execute(statement, {**bound, "before": before, "most": most}, binary=True)
    listed = []
    width = len(_DELIVERY_COLUMNS) + 2
    for columns, rows in itertools.groupby(await cursor.fetchall(), lambda row: row[:width]):
        position, identity, notification_id, user_id, event_id, channel, target, state, key, *rest = columns
        create_time, next_attempt_time, end_time, trace_parent, end_reason, behind, operations, decisions = rest
        delivery = notifications_pb2.Delivery(
            id=str(identity),
            notification_id=str(notification_id),
            user_id=str(user_id),
            event_id="" if event_id == notification_id else str(event_id),
            channel=channel,
            target=target,
            state=state,
            idempotency_key=key,
            attempts=[_attempt_of(row[width:]) for row in rows if row[width] is not None],
            create_time=stamp(create_time),
            next_attempt_time=stamp(next_attempt_time),
            end_time=stamp(end_time),
            trace_parent=trace_parent,
            operations=[_operation_of(done) for done in operations or ()],
            end_reason=end_reason,
            waits_for=str(behind) if behind else "",
            decisions=[_decision_of(made) for made in decisions or ()],
        )
        listed.append(Listed(position, delivery))
    return listed


async def head(connection: Connection) -> int:
    """The position of the newest notification."""
    row = await (await connection.execute(_HEAD)).fetchone()
    return int(row[0]) if row else 0


async def log(connection: Connection) -> tuple[uuid.UUID, int] | None:
    """The identity of the log of notifications and its newest position; None while the inbox has no row."""
    row = await (await connection.execute(_LOG, binary=True)).fetchone()
    return (row[0], row[1]) if row else None


async def tail(
    connection: Connection, after: int, upto: int, most: int, user_id: uuid.UUID | None = None
) -> list[notifications_pb2.Notification]:
    """The first `most` in-app notifications in (after, upto], of one user or of all, in order."""
    values = {"after": after, "upto": upto, "most": most, "channel": IN_APP}
    if user_id is not None:
        values["user_id"] = user_id
    cursor = await connection.execute(_tail(user_id is not None), values, binary=True)
    return [notification(row) for row in await cursor.fetchall()]
