"""The SQL that cancels sends, and settles them: what is pending of one is cancelled, as soon as nobody is at it."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import BigInteger, func, literal_column, null, select, update

from notification_service import errors
from notification_service.domain import SEND_CANCELLED, SendState
from notification_service.store.parts import SECOND, UUID, bind, is_free, number
from notification_service.store.pending import cancellation, still_pending
from notification_service.store.sends import find
from notification_service.tables import deliveries, notifications, sends
from servicekit.database import Connection, sql

# How many notifications of a cancelled send are looked at in one transaction, and how long until the next look at what
# was on its way, seconds.
_SETTLED_AT_ONCE = 1000
_SETTLE_AGAIN = 2

_send = sends.c
_id = bind("id", UUID)
_CANCELLED = number(SendState.CANCELLED)

_CANCEL = sql(
    update(sends)
    .where(_send.id == _id, _send.state != _CANCELLED)
    .values(
        state=_CANCELLED,
        # What has not begun has made nothing that could be pending.
        settled=_send.start_time.is_(None),
        lease_until=null(),
        end_time=func.now(),
    )
    .returning(_send.settled)
)

# Of a cancelled send, notification after notification, so that what is on its way hides nothing.
_looked_at = (
    select(notifications.c.id, notifications.c.position)
    .where(notifications.c.send_id == _id, notifications.c.position > bind("after", BigInteger()))
    .order_by(notifications.c.position)
    .limit(number(_SETTLED_AT_ONCE))
    .cte("looked_at")
)
_free = (
    select(deliveries.c.id)
    .join(_looked_at, _looked_at.c.id == deliveries.c.notification_id)
    .where(still_pending, is_free(deliveries.c))
    .order_by(deliveries.c.id)
    .with_for_update(of=deliveries, skip_locked=True)
    .cte("free")
)
_ended = cancellation.where(deliveries.c.id == _free.c.id).returning(deliveries.c.id).cte("ended")
_count: Any = select(func.count())
_SETTLE = sql(
    select(
        select(func.max(_looked_at.c.position)).scalar_subquery(),
        _count.select_from(_looked_at).scalar_subquery(),
        _count.select_from(_ended).scalar_subquery(),
        # As of the beginning of the statement.
        _count.select_from(deliveries.join(_looked_at, _looked_at.c.id == deliveries.c.notification_id))
        .where(still_pending)
        .scalar_subquery(),
    )
)
_UNSETTLED = sql(
    update(sends)
    .where(
        _send.id.in_(
            select(_send.id)
            .where(
                _send.state == _CANCELLED,
                _send.settled == literal_column("false"),
                is_free(_send),
            )
            .limit(number(1))
            .with_for_update(skip_locked=True)
        )
    )
    .values(lease_until=func.now() + number(_SETTLE_AGAIN) * SECOND)
    .returning(_send.id)
)
_SETTLED = sql(update(sends).where(_send.id == _id).values(settled=literal_column("true"), lease_until=null()))


async def cancel(connection: Connection, identity: uuid.UUID) -> bool:
    """Cancels a send; whether deliveries of it may be pending. Raises UNKNOWN_SEND."""
    row = await (await connection.execute(_CANCEL, {"id": identity})).fetchone()
    if row is None and await find(connection, identity) is None:
        raise errors.unknown_send(str(identity))
    return row is not None and not row[0]


async def unsettled(connection: Connection) -> uuid.UUID | None:
    """A cancelled send of which something may still be pending, not looked at by others for a moment."""
    row = await (await connection.execute(_UNSETTLED)).fetchone()
    return None if row is None else row[0]


async def settle(connection: Connection, identity: uuid.UUID, after: int) -> tuple[int | None, int, int]:
    """Cancels pending deliveries of some notifications of a send, those after a position. Returns after which to go on,
    None at the end; how many were cancelled; and how many are still on their way.
    """
    values = {"id": identity, "after": after, "reason": SEND_CANCELLED}
    row = await (await connection.execute(_SETTLE, values)).fetchone()
    if row is None:
        raise RuntimeError("an aggregate without a row")
    last, looked, ended, pending = row
    return last if looked == _SETTLED_AT_ONCE else None, ended, pending - ended


async def settled(connection: Connection, identity: uuid.UUID) -> None:
    """Nothing of a cancelled send is pending any more."""
    await connection.execute(_SETTLED, {"id": identity})
