"""The SQL of the dispatcher: leases of due deliveries, and the outcomes of attempts."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import (
    ARRAY,
    Float,
    Integer,
    SmallInteger,
    Text,
    any_,
    case,
    func,
    insert,
    not_,
    null,
    or_,
    select,
    update,
)

from notification_service.domain import Ended, Leased, State
from notification_service.store.parts import MILLISECOND, SECOND, UUID, bind, number, rows
from notification_service.tables import attempts, contents, deliveries
from servicekit import arrays
from servicekit.database import Connection, sql

_is_pending = deliveries.c.state == number(State.PENDING)
_is_free = or_(deliveries.c.lease_until.is_(None), deliveries.c.lease_until <= func.now())
_turns = deliveries.c.tries - deliveries.c.tries_before
_max_tries = bind("max_tries", Integer())

_due = (
    select(deliveries.c.id)
    .where(
        _is_pending,
        deliveries.c.channel == bind("channel", Text()),
        deliveries.c.next_attempt_time <= func.now(),
        _is_free,
        _turns < _max_tries,
        not_(deliveries.c.id == any_(bind("busy", ARRAY(UUID)))),
    )
    .order_by(deliveries.c.next_attempt_time)
    .limit(bind("most", Integer()))
    .with_for_update(skip_locked=True)
    .cte("due")
)
_leased = (
    update(deliveries)
    .where(deliveries.c.id == _due.c.id)
    .values(tries=deliveries.c.tries + number(1), lease_until=func.now() + bind("lease", Float()) * SECOND)
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
    .values(state=number(State.PARKED), next_attempt_time=null(), lease_until=null(), end_time=func.now())
    .returning(deliveries.c.id)
)

_end = rows(
    e_id=UUID,
    e_number=Integer(),
    e_outcome=SmallInteger(),
    e_code=Integer(),
    e_detail=Text(),
    e_state=SmallInteger(),
    e_delay=Integer(),
)
_goes_on = _end.c.e_state == number(State.PENDING)
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
        next_attempt_time=case((_goes_on, func.now() + _end.c.e_delay * MILLISECOND)),
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
