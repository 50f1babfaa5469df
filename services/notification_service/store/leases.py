"""The SQL of the dispatcher's work: leases of due deliveries in their order.

A lease is taken in two steps, each one statement and a transaction of its own. `pick` takes what is due and free for a
while; what may not overtake an earlier delivery is put behind it instead, and is not due until that has ended. `begin`
records that an attempt of each begins. Every attempt has the next number, which also fences: only who began the newest
one may record how it ended.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    Boolean,
    Float,
    Integer,
    Select,
    Text,
    and_,
    any_,
    case,
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

from notification_service.domain import Leased, State
from notification_service.store.parts import SECOND, UUID, bind, number, rows
from notification_service.store.pending import is_due, still_pending, turns
from notification_service.tables import attempts, contents, deliveries, notifications, preferences, suppressions
from servicekit import arrays
from servicekit.database import Connection, sql


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
            *is_due,
            turns < bind("max_tries", Integer()),
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
                and_(earlier.c.state == number(State.PARKED), bind("parked_holds", Boolean())),
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
