"""The suppression list: addresses that are not written to, each with the reason.

Addresses are stored as the database's lower() has them: what asks for one compares with lower() of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Integer, Text, and_, bindparam, delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert

from notification_service import errors
from notification_service.store import parts
from notification_service.tables import suppressions
from servicekit.database import Connection, sql

_row = suppressions.c
_COLUMNS = (_row.channel, _row.target, _row.reason, _row.detail, _row.actor, _row.create_time)


def _text(name: str) -> Any:
    return parts.bind(name, Text())


_KEY = and_(_row.channel == _text("channel"), _row.target == func.lower(_text("target")))

_FIND = sql(select(*_COLUMNS).where(_KEY))
_CREATE = sql(
    insert(suppressions)
    .values(
        channel=_text("channel"),
        target=func.lower(_text("target")),
        reason=_text("reason"),
        detail=_text("detail"),
        actor=_text("actor"),
        create_time=func.now(),
    )
    .on_conflict_do_nothing()
    .returning(*_COLUMNS)
)
_DELETE = sql(delete(suppressions).where(_KEY).returning(*_COLUMNS))
_DELETE_FOR = sql(delete(suppressions).where(_KEY, _row.reason == _text("reason")).returning(*_COLUMNS))


@dataclass(frozen=True, slots=True)
class Suppression:
    """A row; `reason` is the name of a Suppression.Reason."""

    channel: str
    target: str
    reason: str
    detail: str
    actor: str
    create_time: datetime


async def create(
    connection: Connection, *, channel: str, target: str, reason: str, detail: str, actor: str
) -> Suppression:
    """Suppresses an address. Raises SUPPRESSED, with the reason, if it is already."""
    values = {"channel": channel, "target": target, "reason": reason, "detail": detail, "actor": actor}
    while True:
        row = await (await connection.execute(_CREATE, values)).fetchone()
        if row:
            return Suppression(*row)
        row = await (await connection.execute(_FIND, values)).fetchone()
        # One that was deleted in between is gone: it is tried again.
        if row:
            raise errors.suppressed(channel, row[1], row[2])


async def find(connection: Connection, *, channel: str, target: str) -> Suppression | None:
    """The suppression of an address; None if there is none."""
    row = await (await connection.execute(_FIND, {"channel": channel, "target": target})).fetchone()
    return Suppression(*row) if row else None


async def remove(connection: Connection, *, channel: str, target: str, reason: str = "") -> Suppression:
    """Ends a suppression, with a reason only one for it; returns what it was. Raises NOT_SUPPRESSED."""
    values = {"channel": channel, "target": target} | ({"reason": reason} if reason else {})
    row = await (await connection.execute(_DELETE_FOR if reason else _DELETE, values)).fetchone()
    if row is None:
        raise errors.not_suppressed(channel, target)
    return Suppression(*row)


@cache
def _page(names: frozenset[str]) -> str:
    wanted = (_row[name] == (func.lower(_text(name)) if name == "target" else _text(name)) for name in sorted(names))
    after = tuple_(_text("after_channel"), _text("after_target"))
    return sql(
        select(*_COLUMNS)
        .where(tuple_(_row.channel, _row.target) > after, *wanted)
        .order_by(_row.channel, _row.target)
        .limit(bindparam("most", type_=Integer))
    )


async def page(
    connection: Connection, filters: Mapping[str, Any], after: tuple[str, str], most: int
) -> list[Suppression]:
    """At most so many that match, by column, in the order of channel and target, after a channel and target."""
    values = {**filters, "after_channel": after[0], "after_target": after[1], "most": most}
    cursor = await connection.execute(_page(frozenset(filters)), values)
    return [Suppression(*row) for row in await cursor.fetchall()]
