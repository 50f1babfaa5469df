"""The SQL of how deliveries end: outcomes of attempts, and what no attempt of had one.

Who ends a delivery lets those behind it go in the same statement. One that was put behind it at that very moment is
not seen by it: `let_go` finds it, a little later.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import Boolean, Integer, SmallInteger, Text, case, exists, func, not_, null, select, update

from notification_service.domain import Ended, State
from notification_service.store.parts import MILLISECOND, UUID, bind, number, rows
from notification_service.store.pending import (
    LET_GO,
    is_due,
    is_pending,
    let_go_behind,
    of_channel,
    still_pending,
    turns,
)
from notification_service.tables import attempts, deliveries
from servicekit import arrays
from servicekit.database import Connection, sql

_PARK_EXHAUSTED = sql(
    update(deliveries)
    .where(
        *is_due,
        turns >= bind("max_tries", Integer()),
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
_holds = case((bind("parked_holds", Boolean()), number(State.PARKED)), else_=number(State.PENDING))
_let_go = let_go_behind(_fenced, _fenced.c.state.not_in((number(State.PENDING), _holds)))
_recorded = (
    update(attempts)
    .where(attempts.c.delivery_id == _fenced.c.id, attempts.c.number == _fenced.c.e_number)
    .values(outcome=_fenced.c.e_outcome, code=_fenced.c.e_code, detail=_fenced.c.e_detail, end_time=func.now())
    .returning(attempts.c.delivery_id)
    .cte("recorded")
)
_RECORD = sql(select(_recorded.c.delivery_id, select(func.count()).select_from(_let_go).scalar_subquery()))

_LET_GO = sql(
    update(deliveries)
    .where(
        deliveries.c.behind.is_not(None),
        is_pending,
        of_channel,
        not_(
            exists().where(
                _earlier.c.id == deliveries.c.behind,
                _earlier.c.state.in_((number(State.PENDING), _holds)),
                _earlier.c.deferred.is_(None),
            )
        ),
    )
    .values(**LET_GO)
    .returning(deliveries.c.id)
)


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
