"""The SQL of the dispatcher: leases of due deliveries in their order, and the outcomes of attempts.

A lease is taken in two steps, each one statement and a transaction of its own. `pick` takes what is due and free for a
while; what may not overtake an earlier delivery is put behind it instead, and is not due until that has ended. `begin`
records that an attempt of each begins. Every attempt has the next number, which also fences: only who began the newest
one may record how it ended.

Who ends a delivery lets those behind it go in the same statement. One that was put behind it at that very moment is
not seen by it: `let_go` finds it, a little later.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    Boolean,
    ColumnElement,
    Float,
    Integer,
    Select,
    SmallInteger,
    Text,
    all_,
    and_,
    any_,
    case,
    exists,
    func,
    insert,
    lateral,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
    update,
)

from notification_service.domain import Ended, Leased, State
from notification_service.store.parts import MILLISECOND, SECOND, UUID, bind, number, rows
from notification_service.tables import attempts, contents, deliveries, notifications, preferences, suppressions
from servicekit import arrays
from servicekit.database import Connection, sql

_is_pending = deliveries.c.state == number(State.PENDING)
# For statements that know which deliveries they are about: an index by state is of no use to them, and hidden from the
# planner. By statistics of a moment in which nothing was pending it looks empty, and all that is pending since would be
# walked through for each batch.
still_pending = deliveries.c.state + number(0) == number(State.PENDING)
_is_free = or_(deliveries.c.lease_until.is_(None), deliveries.c.lease_until <= func.now())
_turns = deliveries.c.tries - deliveries.c.tries_before
_max_tries = bind("max_tries", Integer())
_channel = bind("channel", Text())
_parked_holds = bind("parked_holds", Boolean())


@dataclass(frozen=True, slots=True)
class Picked:
    """A delivery that is this process's for a while, to be begun or not."""

    id: uuid.UUID
    tries: int
    target: str
    failed_provider: str
    user_id: uuid.UUID
    category: str
    time_zone: str
    # preferences.document, None for a user without one; why the target is suppressed, empty if it is not.
    document: Mapping[str, Any] | None
    suppressed: str


def _due(most: Any) -> Select[Any]:
    """What is due and free, the longest due first; locked."""
    return (
        select(deliveries.c.id, deliveries.c.user_id, deliveries.c.channel, deliveries.c.target, deliveries.c.position)
        .where(
            _is_pending,
            deliveries.c.channel == _channel,
            deliveries.c.next_attempt_time <= func.now(),
            _is_free,
            _turns < _max_tries,
            not_(deliveries.c.id == any_(bind("busy", ARRAY(UUID)))),
        )
        .order_by(deliveries.c.next_attempt_time)
        .limit(most)
        .with_for_update(of=deliveries, skip_locked=True)
    )


def _pick(due: Any) -> str:
    earlier = deliveries.alias("earlier")
    before = (
        select(earlier.c.id)
        .where(
            earlier.c.user_id == due.c.user_id,
            earlier.c.channel == due.c.channel,
            earlier.c.position < due.c.position,
            # As the index has it.
            earlier.c.state.in_((number(State.PENDING), number(State.PARKED))),
            or_(
                and_(
                    earlier.c.state == number(State.PENDING),
                    earlier.c.target == due.c.target,
                    earlier.c.deferred.is_(None),
                ),
                and_(earlier.c.state == number(State.PARKED), _parked_holds),
            ),
        )
        .order_by(earlier.c.position.desc())
        .limit(number(1))
        .scalar_subquery()
    )
    looked = select(due.c.id, before.label("behind")).cte("looked")
    goes = looked.c.behind.is_(None)
    picked = (
        update(deliveries)
        .where(deliveries.c.id == looked.c.id)
        .values(
            behind=looked.c.behind,
            next_attempt_time=case((goes, deliveries.c.next_attempt_time)),
            lease_until=case((goes, func.now() + bind("lease", Float()) * SECOND)),
            deferred=null(),
        )
        .returning(
            deliveries.c.id,
            deliveries.c.tries,
            deliveries.c.target,
            deliveries.c.failed_provider,
            deliveries.c.position,
            deliveries.c.behind,
            deliveries.c.notification_id,
            deliveries.c.user_id,
            deliveries.c.channel,
        )
        .cte("picked")
    )
    return sql(
        select(
            picked.c.id,
            picked.c.tries,
            picked.c.target,
            picked.c.failed_provider,
            picked.c.user_id,
            notifications.c.category,
            notifications.c.time_zone,
            preferences.c.document,
            func.coalesce(suppressions.c.reason, literal_column("''")),
            picked.c.behind,
        )
        .join(notifications, notifications.c.id == picked.c.notification_id)
        .outerjoin(preferences, preferences.c.user_id == picked.c.user_id)
        .outerjoin(
            suppressions,
            and_(suppressions.c.channel == picked.c.channel, suppressions.c.target == func.lower(picked.c.target)),
        )
        .order_by(picked.c.position)
    )


_PICK = _pick(_due(bind("most", Integer())).cte("due"))
_asked = rows(a_target=Text(), a_most=Integer())
_of_target = lateral(_due(_asked.c.a_most).where(deliveries.c.target == _asked.c.a_target), name="of_target")
_PICK_OF_TARGETS = _pick(
    select(*_of_target.c).select_from(_asked.join(_of_target, true())).limit(bind("most", Integer())).cte("due")
)

_start = rows(b_id=UUID, b_tries=Integer(), b_provider=Text())
_begun = (
    update(deliveries)
    .where(deliveries.c.id == _start.c.b_id, deliveries.c.tries == _start.c.b_tries, still_pending)
    .values(
        tries=deliveries.c.tries + number(1),
        give_up_time=func.coalesce(deliveries.c.give_up_time, func.now() + bind("max_age", Float()) * SECOND),
    )
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
        deliveries.c.give_up_time,
        deliveries.c.failed_provider,
        deliveries.c.position,
        _start.c.b_provider,
    )
    .cte("begun")
)
_noted = (
    insert(attempts)
    .from_select(
        ["delivery_id", "number", "start_time", "provider"],
        select(_begun.c.id, _begun.c.tries, func.now(), _begun.c.b_provider),
    )
    .cte("noted")
)
_BEGIN = sql(
    select(
        _begun.c.id,
        _begun.c.tries,
        _begun.c.channel,
        _begun.c.target,
        _begun.c.idempotency_key,
        contents.c.content,
        _begun.c.create_time,
        _begun.c.trace_parent,
        _begun.c.trace_state,
        _begun.c.event_id,
        _begun.c.tries_before,
        _begun.c.give_up_time <= func.now(),
        _begun.c.b_provider,
        _begun.c.failed_provider,
    )
    .join(contents, contents.c.delivery_id == _begun.c.id)
    .order_by(_begun.c.position)
    .add_cte(_noted)
)

_back = rows(g_id=UUID, g_tries=Integer())
_GIVE_BACK = sql(
    update(deliveries)
    # Whoever has begun it in the meantime keeps it.
    .where(deliveries.c.id == _back.c.g_id, deliveries.c.tries == _back.c.g_tries, still_pending)
    .values(lease_until=null())
)

_PARK_EXHAUSTED = sql(
    update(deliveries)
    .where(
        _is_pending,
        deliveries.c.channel == _channel,
        deliveries.c.next_attempt_time <= func.now(),
        _is_free,
        _turns >= _max_tries,
    )
    .values(
        state=number(State.PARKED),
        next_attempt_time=null(),
        lease_until=null(),
        end_time=func.now(),
        end_reason=bind("reason", Text()),
    )
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
    e_reason=Text(),
    e_uncounted=Integer(),
    e_failed_provider=Text(),
)
_goes_on = _end.c.e_state == number(State.PENDING)
_fenced = (
    update(deliveries)
    # An attempt from before a replay has lost its lease, too: it would park what is to be tried again.
    .where(
        deliveries.c.id == _end.c.e_id,
        deliveries.c.tries == _end.c.e_number,
        deliveries.c.tries_before < _end.c.e_number,
        still_pending,
    )
    .values(
        state=_end.c.e_state,
        lease_until=null(),
        next_attempt_time=case((_goes_on, func.now() + _end.c.e_delay * MILLISECOND)),
        end_time=case((not_(_goes_on), func.now())),
        end_reason=_end.c.e_reason,
        tries_before=deliveries.c.tries_before + _end.c.e_uncounted,
        failed_provider=_end.c.e_failed_provider,
    )
    .returning(deliveries.c.id, deliveries.c.state, _end.c.e_number, _end.c.e_outcome, _end.c.e_code, _end.c.e_detail)
    .cte("fenced")
)
_earlier = deliveries.alias("earlier")
_holds = case((_parked_holds, number(State.PARKED)), else_=number(State.PENDING))
_let_go_behind = (
    update(deliveries)
    .where(
        deliveries.c.behind == _fenced.c.id,
        still_pending,
        _fenced.c.state.not_in((number(State.PENDING), _holds)),
    )
    .values(behind=null(), next_attempt_time=func.now())
    .returning(deliveries.c.id)
    .cte("let_go")
)
_recorded = (
    update(attempts)
    .where(attempts.c.delivery_id == _fenced.c.id, attempts.c.number == _fenced.c.e_number)
    .values(outcome=_fenced.c.e_outcome, code=_fenced.c.e_code, detail=_fenced.c.e_detail, end_time=func.now())
    .returning(attempts.c.delivery_id)
    .cte("recorded")
)
_RECORD = sql(select(_recorded.c.delivery_id, select(func.count()).select_from(_let_go_behind).scalar_subquery()))

_LET_GO = sql(
    update(deliveries)
    .where(
        deliveries.c.behind.is_not(None),
        deliveries.c.state == number(State.PENDING),
        deliveries.c.channel == _channel,
        not_(
            exists().where(
                _earlier.c.id == deliveries.c.behind,
                _earlier.c.state.in_((number(State.PENDING), _holds)),
                _earlier.c.deferred.is_(None),
            )
        ),
    )
    .values(behind=null(), next_attempt_time=func.now())
    .returning(deliveries.c.id)
)


def _cancel(pending: ColumnElement[bool]) -> Any:
    return (
        update(deliveries)
        .where(pending, _is_free)
        .values(
            state=number(State.CANCELLED),
            behind=null(),
            next_attempt_time=null(),
            end_time=func.now(),
            end_reason=bind("reason", Text()),
        )
    )


# Cancels known deliveries, for the parameter `reason`. What is on its way just now goes on: its outcome says more.
cancellation = _cancel(still_pending)
_cancelled = _cancel(_is_pending).where(deliveries.c.channel == _channel).returning(deliveries.c.id)
_CANCEL_GONE = sql(
    _cancelled.where(
        deliveries.c.target != all_(bind("known", ARRAY(Text()))),
        deliveries.c.next_attempt_time < func.now() - bind("patience", Float()) * SECOND,
    )
)
_CANCEL_TARGET = sql(_cancelled.where(deliveries.c.target == bind("target", Text())))


async def pick(
    connection: Connection,
    channel: str,
    most: int,
    targets: Mapping[str, int] | None,
    *,
    seconds: float,
    max_tries: int,
    parked_holds: bool = True,
    busy: Sequence[uuid.UUID],
) -> tuple[list[Picked], int]:
    """Takes at most `most` due deliveries of a channel, if `targets` are given so many of each and of no other.

    Returns those that are this process's for so many seconds, in their order, and how many were put behind others.
    """
    values: dict[str, Any] = {
        "channel": channel,
        "most": most,
        "lease": seconds,
        "max_tries": max_tries,
        "parked_holds": parked_holds,
        "busy": arrays.uuids(busy),
    }
    if targets is not None:
        values["a_target"] = arrays.texts(list(targets))
        values["a_most"] = arrays.integers(list(targets.values()))
    statement = _PICK if targets is None else _PICK_OF_TARGETS
    found = await (await connection.execute(statement, values, binary=True)).fetchall()
    taken = [Picked(*row) for *row, behind in found if behind is None]
    return taken, len(found) - len(taken)


async def begin(connection: Connection, picked: Sequence[tuple[Picked, str]], *, max_age: float) -> list[Leased]:
    """Records that an attempt of each begins, by the provider that stands beside it. What another process has begun in
    the meantime is not among what is returned. Each is given up `max_age` seconds after its first attempt.
    """
    values = {
        "b_id": arrays.uuids([one.id for one, _ in picked]),
        "b_tries": arrays.integers([one.tries for one, _ in picked]),
        "b_provider": arrays.texts([provider for _, provider in picked]),
        "max_age": max_age,
    }
    cursor = await connection.execute(_BEGIN, values, binary=True)
    return [Leased(*row) for row in await cursor.fetchall()]


async def give_back(connection: Connection, picked: Sequence[Picked]) -> None:
    """Lets others pick what was not begun."""
    values = {
        "g_id": arrays.uuids([one.id for one in picked]),
        "g_tries": arrays.integers([one.tries for one in picked]),
    }
    await connection.execute(_GIVE_BACK, values)


async def record(connection: Connection, ended: Sequence[Ended], *, parked_holds: bool = True) -> set[uuid.UUID]:
    """Records how attempts ended, and lets go what waited for a delivery that has ended with one. Returns those whose
    lease was still held; of the others nothing is written.
    """
    values = {
        "e_id": arrays.uuids([one.id for one in ended]),
        "e_number": arrays.integers([one.number for one in ended]),
        "e_outcome": arrays.smallints([one.result for one in ended]),
        "e_code": arrays.integers([one.code for one in ended]),
        "e_detail": arrays.texts([one.detail for one in ended]),
        "e_state": arrays.smallints([one.state for one in ended]),
        "e_delay": arrays.integers([int(one.delay * 1000) for one in ended]),
        "e_reason": arrays.texts([one.reason for one in ended]),
        "e_uncounted": arrays.integers([0 if one.counts else 1 for one in ended]),
        "e_failed_provider": arrays.texts([one.failed_provider for one in ended]),
        "parked_holds": parked_holds,
    }
    cursor = await connection.execute(_RECORD, values, binary=True)
    return {identity for identity, _ in await cursor.fetchall()}


async def park_exhausted(connection: Connection, channel: str, max_tries: int, reason: str) -> list[uuid.UUID]:
    """Parks deliveries whose every attempt ended without an answer: whoever made the last one died over it."""
    values = {"channel": channel, "max_tries": max_tries, "reason": reason}
    cursor = await connection.execute(_PARK_EXHAUSTED, values)
    return [identity for (identity,) in await cursor.fetchall()]


async def let_go(connection: Connection, channel: str, *, parked_holds: bool = True) -> int:
    """Lets go what waits for a delivery that holds nobody back any more. Returns how many."""
    cursor = await connection.execute(_LET_GO, {"channel": channel, "parked_holds": parked_holds})
    return len(await cursor.fetchall())


async def cancel_gone(
    connection: Connection, channel: str, known: Collection[str], *, patience: float, reason: str
) -> list[uuid.UUID]:
    """Cancels what has been due for `patience` seconds on its way to a target that is none of the known ones."""
    values = {"channel": channel, "known": arrays.texts(list(known)), "patience": patience, "reason": reason}
    return [identity for (identity,) in await (await connection.execute(_CANCEL_GONE, values)).fetchall()]


async def cancel_target(connection: Connection, channel: str, target: str, *, reason: str) -> list[uuid.UUID]:
    """Cancels what is on its way to a target, but for attempts that have begun."""
    values = {"channel": channel, "target": target, "reason": reason}
    return [identity for (identity,) in await (await connection.execute(_CANCEL_TARGET, values)).fetchall()]
