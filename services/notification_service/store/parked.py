"""Replays and discards parked deliveries, and keeps who did it, when and why.

Nobody else changes a delivery that is parked: the dispatcher has nothing to do with it, and operations run one after
another, under a lock that ends with their transaction. So what is parked under it is a plain read. A replay keeps
the idempotency key, so that the other side recognises what it has had, and the numbers of the attempts, but gives the
policy's tries anew.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Text,
    any_,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import UUID

from notification_service import errors
from notification_service.domain import DISCARDED_BY_HAND, Operation, State
from notification_service.store.parts import number
from notification_service.tables import contents, deliveries, delivery_operations, inbox
from servicekit import arrays
from servicekit.database import Connection, sql

# Taken by each transaction that changes parked deliveries.
_OPERATIONS_LOCK = 0x7469_6469_6E67_7302
_LOCK = f"SELECT pg_advisory_xact_lock({_OPERATIONS_LOCK})"

# A bulk operation commits after so many: nothing waits for it long.
_PAGE = 1000

_delivery = deliveries.c


_EMPTY, _BY_HAND = literal_column("''", Text), literal_column(f"'{DISCARDED_BY_HAND}'", Text)
_IDS = bindparam("ids", type_=ARRAY(UUID(as_uuid=True)))
_is_parked = _delivery.state == number(State.PARKED)
# One that could not be composed was parked when it was made.
_has_content = exists().where(contents.c.delivery_id == _delivery.id)

_CHANGES: Mapping[Operation, Mapping[str, Any]] = {
    Operation.REPLAYED: {
        "state": number(State.PENDING),
        "tries_before": _delivery.tries,
        "next_attempt_time": func.now(),
        "end_time": null(),
        "end_reason": _EMPTY,
        "give_up_time": null(),
    },
    Operation.DISCARDED: {"state": number(State.DISCARDED), "end_time": func.now(), "end_reason": _BY_HAND},
}

_LOOK = sql(select(_delivery.id, _delivery.state, _has_content).where(_delivery.id == any_(_IDS)))
_HEAD = sql(select(inbox.c.delivery_position))


def _change(operation: Operation, which: ColumnElement[bool]) -> tuple[Any, Any]:
    """What changes deliveries, and what notes it."""
    changed = update(deliveries).where(which).values(_CHANGES[operation]).returning(_delivery.id).cte("changed")
    noted = insert(delivery_operations).from_select(
        ["delivery_id", "kind", "actor", "reason", "time"],
        select(
            changed.c.id,
            number(operation),
            bindparam("actor", type_=Text),
            bindparam("reason", type_=Text),
            func.now(),
        ),
    )
    return changed, noted.cte("noted")


@cache
def _change_ids(operation: Operation) -> str:
    changed, noted = _change(operation, _delivery.id == any_(_IDS))
    return sql(select(func.count()).select_from(changed).add_cte(noted))


@cache
def _change_page(operation: Operation, names: frozenset[str]) -> str:
    """One page of what is parked and matches: its last position, null if it is empty, and how many were changed."""
    wanted: Select[Any] = select(_delivery.id, _delivery.position).where(
        _is_parked,
        _delivery.position > bindparam("after", type_=BigInteger),
        _delivery.position <= bindparam("upto", type_=BigInteger),
        *(_delivery[name] == bindparam(name, type_=_delivery[name].type) for name in sorted(names)),
    )
    if operation is Operation.REPLAYED:
        wanted = wanted.where(_has_content)
    page = wanted.order_by(_delivery.position).limit(bindparam("most", type_=Integer)).cte("page")
    changed, noted = _change(operation, _delivery.id == page.c.id)
    return sql(
        select(
            select(func.max(page.c.position)).scalar_subquery(),
            select(func.count()).select_from(changed).scalar_subquery(),
        ).add_cte(noted)
    )


async def change(
    connection: Connection, operation: Operation, ids: Sequence[uuid.UUID], *, actor: str, reason: str
) -> int:
    """Replays or discards deliveries, all of them or none. Returns how many.

    Raises UNKNOWN_DELIVERY, NOT_PARKED, or NOTHING_TO_SEND for a replay of what could not be composed.
    """
    values = {"ids": arrays.uuids(ids)}
    async with connection.transaction():
        await connection.execute(_LOCK)
        # A statement's snapshot is older than the lock it waits for: what is parked is read by the next one.
        cursor = await connection.execute(_LOOK, values, binary=True)
        found = {identity: (State(state), has_content) for identity, state, has_content in await cursor.fetchall()}
        if missing := [one for one in ids if one not in found]:
            raise errors.unknown_delivery(missing)
        if others := {one: found[one][0].name for one in ids if found[one][0] is not State.PARKED}:
            raise errors.not_parked(others)
        if operation is Operation.REPLAYED and (empty := [one for one in ids if not found[one][1]]):
            raise errors.nothing_to_send(empty)
        row = await (
            await connection.execute(_change_ids(operation), {**values, "actor": actor, "reason": reason})
        ).fetchone()
    return int(row[0]) if row else 0


async def change_all(
    connection: Connection,
    operation: Operation,
    filters: Mapping[str, Any],
    *,
    actor: str,
    reason: str,
    page: int = _PAGE,
) -> int:
    """Replays or discards all that is parked and matches, by column, a page in a transaction. Returns how many.

    What could not be composed is not replayed. What is made, or parked again, meanwhile is not looked at.
    """
    statement = _change_page(operation, frozenset(filters))
    row = await (await connection.execute(_HEAD)).fetchone()
    values = {**filters, "upto": row[0] if row else 0, "most": page, "actor": actor, "reason": reason}
    after, changed = 0, 0
    while True:
        async with connection.transaction():
            await connection.execute(_LOCK)
            row = await (await connection.execute(statement, {**values, "after": after})).fetchone()
        if row is None or row[0] is None:
            return changed
        after = row[0]
        changed += row[1]
