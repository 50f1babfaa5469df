"""The addresses that a user was written to."""

from __future__ import annotations

import uuid

from sqlalchemy import Text, select

from notification_service.store import parts
from notification_service.tables import deliveries
from servicekit.database import Connection, sql

# However many deliveries a user has, only the newest are looked at.
_MOST = 2000

_newest = (
    select(deliveries.c.channel, deliveries.c.target)
    .where(deliveries.c.user_id == parts.bind("user_id", parts.UUID))
    .order_by(deliveries.c.position.desc())
    .limit(parts.number(_MOST))
    .subquery()
)
_OF_USER = sql(select(_newest.c.target).distinct().where(_newest.c.channel == parts.bind("channel", Text())))


async def of_user(connection: Connection, user_id: uuid.UUID, channel: str) -> list[str]:
    """The targets of a user's newest deliveries over a channel, each once, as they were written to."""
    cursor = await connection.execute(_OF_USER, {"user_id": user_id, "channel": channel})
    return [target for (target,) in await cursor.fetchall()]
