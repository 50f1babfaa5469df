"""What users decided, stored: read, and changed field by field under the lock of the user's row."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import BigInteger, bindparam, func, select, update
from sqlalchemy.dialects.postgresql import JSONB, insert

from notification_service import errors
from notification_service.domain import State
from notification_service.store import parts
from notification_service.tables import deliveries, preferences
from servicekit.database import Connection, sql

_row = preferences.c
_USER = parts.bind("user_id", parts.UUID)

_FIND = sql(select(_row.document, _row.version, _row.update_time).where(_row.user_id == _USER))
_MAKE = sql(
    insert(preferences)
    .values(user_id=_USER, document=bindparam("document", type_=JSONB), version=parts.number(0), update_time=func.now())
    .on_conflict_do_nothing()
)
_LOCK = sql(select(_row.document, _row.version, _row.update_time).where(_row.user_id == _USER).with_for_update())
_CHANGE = sql(
    update(preferences)
    .where(_row.user_id == _USER)
    .values(
        document=bindparam("document", type_=JSONB),
        version=bindparam("version", type_=BigInteger),
        update_time=func.now(),
    )
    .returning(_row.update_time)
)

# What waits for the end of quiet hours is asked about again: they may be others now.
_ASK_AGAIN = sql(
    update(deliveries)
    .where(
        deliveries.c.user_id == _USER,
        deliveries.c.state == parts.number(State.PENDING),
        deliveries.c.deferred.is_not(None),
        deliveries.c.next_attempt_time > func.now(),
    )
    .values(next_attempt_time=func.now())
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A user's document (its keys: the preferences module) and its version; version 0 is a user without one."""

    document: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0
    update_time: datetime | None = None


async def find(connection: Connection, user_id: uuid.UUID) -> Stored:
    """What a user decided."""
    row = await (await connection.execute(_FIND, {"user_id": user_id})).fetchone()
    return Stored(*row) if row else Stored()


async def change(connection: Connection, user_id: uuid.UUID, changes: Mapping[str, Any], *, version: int = 0) -> Stored:
    """Sets the keys of a user's document to those of `changes`, which must be valid; an empty value removes its key.
    What is deferred is due at once, to be judged by them.

    With a version that is not 0 only if that is the current one. Raises STALE_VERSION.
    """

    def decide(found: Stored) -> Mapping[str, Any]:
        if version and version != found.version:
            raise errors.stale_preferences(user_id, version, found.version)
        return changes

    return await edit(connection, user_id, decide)


async def edit(
    connection: Connection, user_id: uuid.UUID, decide: Callable[[Stored], Mapping[str, Any] | None]
) -> Stored:
    """Sets the keys of a user's document to those that `decide` says, as `change` does, while nobody else changes it;
    None is no change.
    """
    async with connection.transaction() as transaction:
        # Whoever comes first makes the row, so that there is one to lock; a refusal takes it back.
        await connection.execute(_MAKE, {"user_id": user_id, "document": Jsonb({})})
        row = await (await connection.execute(_LOCK, {"user_id": user_id})).fetchone()
        if row is None:  # nothing removes rows
            raise RuntimeError(f"the preferences of {user_id} are gone")
        found = Stored(*row)
        changes = decide(found)
        if changes is None:
            raise psycopg.Rollback(transaction)
        document = {key: value for key, value in {**found.document, **changes}.items() if value}
        values = {"user_id": user_id, "document": Jsonb(document), "version": found.version + 1}
        changed = await (await connection.execute(_CHANGE, values)).fetchone()
        await connection.execute(_ASK_AGAIN, {"user_id": user_id})
        return Stored(document, found.version + 1, changed[0] if changed else None)
    return found
