"""The SQL of what would become of deliveries now: what their users want, and whether they are on their way."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, and_, any_, func, literal_column, select

from notification_service.store.parts import UUID, bind
from notification_service.tables import deliveries, notifications, preferences, suppressions
from servicekit import arrays
from servicekit.database import Connection, sql


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a delivery would be judged by; see gate.Candidate."""

    time_zone: str
    document: Mapping[str, Any] | None
    document_time: datetime | None
    suppressed: str
    # Whether it is some process's now.
    leased: bool


_FIND = sql(
    select(
        deliveries.c.id,
        notifications.c.time_zone,
        preferences.c.document,
        preferences.c.update_time,
        func.coalesce(suppressions.c.reason, literal_column("''")),
        func.coalesce(deliveries.c.lease_until > func.now(), literal_column("false")),
    )
    .join(notifications, notifications.c.id == deliveries.c.notification_id)
    .outerjoin(preferences, preferences.c.user_id == deliveries.c.user_id)
    .outerjoin(
        suppressions,
        and_(suppressions.c.channel == deliveries.c.channel, suppressions.c.target == func.lower(deliveries.c.target)),
    )
    .where(deliveries.c.notification_id == any_(bind("ids", ARRAY(UUID))))
)


async def find(connection: Connection, notification_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Circumstances]:
    """By delivery, of all deliveries of these notifications."""
    found = await connection.execute(_FIND, {"ids": arrays.uuids(notification_ids)})
    return {identity: Circumstances(*row) for identity, *row in await found.fetchall()}
