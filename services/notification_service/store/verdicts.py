"""The SQL of the gate's verdicts: what is due but must wait, or must never be sent, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import SmallInteger, Text, case, func, insert, not_, null, select, update

from notification_service.domain import State
from notification_service.gate import Cancel, Defer
from notification_service.store.leases import Picked
from notification_service.store.parts import TIME, UUID, number, rows
from notification_service.store.pending import let_go_behind, still_pending
from notification_service.tables import deliveries, delivery_decisions
from servicekit import arrays
from servicekit.database import Connection, sql

_verdict = rows(
    v_id=UUID, v_tries=SmallInteger(), v_until=TIME, v_kind=SmallInteger(), v_reason=Text(), v_detail=Text()
)
_waits = _verdict.c.v_until.is_not(None)
_decided = (
    update(deliveries)
    .where(
        deliveries.c.id == _verdict.c.v_id,
        deliveries.c.tries == _verdict.c.v_tries,
        still_pending,
    )
    .values(
        state=case((_waits, number(State.PENDING)), else_=number(State.CANCELLED)),
        deferred=case((_waits, _verdict.c.v_kind)),
        next_attempt_time=_verdict.c.v_until,
        end_time=case((not_(_waits), func.now())),
        end_reason=case((_waits, deliveries.c.end_reason), else_=_verdict.c.v_reason),
        lease_until=null(),
    )
    .returning(deliveries.c.id, _verdict.c.v_kind, _verdict.c.v_detail)
    .cte("decided")
)
# What waited for one of them need not wait for it any more.
_let_go = let_go_behind(_decided)
_noted = (
    insert(delivery_decisions)
    .from_select(
        ["delivery_id", "kind", "detail", "time"],
        select(_decided.c.id, _decided.c.v_kind, _decided.c.v_detail, func.now()),
    )
    .returning(delivery_decisions.c.delivery_id)
    .cte("noted")
)
_count: Any = select(func.count())
_SET_ASIDE = sql(select(_count.select_from(_noted).scalar_subquery(), _count.select_from(_let_go).scalar_subquery()))


async def set_aside(connection: Connection, verdicts: Sequence[tuple[Picked, Defer | Cancel]]) -> None:
    """Defers or cancels what was picked, and notes why. What another process has begun meanwhile is left alone."""
    found = [(one, verdict, verdict.until if isinstance(verdict, Defer) else None) for one, verdict in verdicts]
    values = {
        "v_id": arrays.uuids([one.id for one, _, _ in found]),
        "v_tries": arrays.smallints([one.tries for one, _, _ in found]),
        "v_until": [until for _, _, until in found],
        "v_kind": arrays.smallints([int(verdict.reason) for _, verdict, _ in found]),
        "v_reason": arrays.texts([verdict.reason.name for _, verdict, _ in found]),
        "v_detail": arrays.texts([verdict.detail for _, verdict, _ in found]),
    }
    await connection.execute(_SET_ASIDE, values)
