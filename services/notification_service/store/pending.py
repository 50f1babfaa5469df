"""The SQL of deliveries that are pending: which those are, who waits behind one, and their cancellation.

What is on its way just now is not cancelled: its outcome says more.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Float, Text, all_, func, null, update

from notification_service.domain import State
from notification_service.store.parts import SECOND, bind, is_free, number
from notification_service.tables import deliveries
from servicekit import arrays
from servicekit.database import Connection, sql

is_pending = deliveries.c.state == number(State.PENDING)
# For statements that know which deliveries they are about: an index by state is of no use to them, and hidden from the
# planner. By statistics of a moment in which nothing was pending it looks empty, and all that is pending since would be
# walked through for each batch.
still_pending = deliveries.c.state + number(0) == number(State.PENDING)
# How many of the policy's tries it has had.
turns = deliveries.c.tries - deliveries.c.tries_before
of_channel = deliveries.c.channel == bind("channel", Text())
is_due = (is_pending, of_channel, deliveries.c.next_attempt_time <= func.now(), is_free(deliveries.c))

# What becomes of a delivery that need not wait for another any more.
LET_GO: dict[str, Any] = {"behind": null(), "next_attempt_time": func.now()}


def let_go_behind(ended: Any, *conditions: ColumnElement[bool]) -> Any:
    """A part of the statement that makes the deliveries `ended`, for others to count: lets go what waits for them."""
    return (
        update(deliveries)
        .where(deliveries.c.behind == ended.c.id, still_pending, *conditions)
        .values(**LET_GO)
        .returning(deliveries.c.id)
        .cte("let_go")
    )


def _cancel(pending: ColumnElement[bool]) -> Any:
    return (
        update(deliveries)
        .where(pending, is_free(deliveries.c))
        .values(
            state=number(State.CANCELLED),
            behind=null(),
            next_attempt_time=null(),
            end_time=func.now(),
            end_reason=bind("reason", Text()),
        )
    )


# Cancels known deliveries, for the parameter `reason`.
cancellation = _cancel(still_pending)
_cancelled = _cancel(is_pending).where(of_channel).returning(deliveries.c.id)
_CANCEL_GONE = sql(
    _cancelled.where(
        deliveries.c.target != all_(bind("known", ARRAY(Text()))),
        deliveries.c.next_attempt_time < func.now() - bind("patience", Float()) * SECOND,
    )
)
_CANCEL_TARGET = sql(_cancelled.where(deliveries.c.target == bind("target", Text())))


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
