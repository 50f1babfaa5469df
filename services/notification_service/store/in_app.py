"""The SQL of the in-app inbox: what a user has there, how much of it is new, and what the user did with it.

Counts, lists and marks each go by a partial index of what they are about, so that they cost what they find. Changes of
one user's inbox follow one another, under a lock that ends with their transaction: two devices that mark the same
notifications in another order wait, they do not lock each other out. A change also counts up the version of the user's
inbox in the same transaction, which is how other replicas notice it without counting.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Integer,
    Text,
    and_,
    any_,
    func,
    literal_column,
    null,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from notification_service import errors
from notification_service.domain import Change
from notification_service.store import reads
from notification_service.store.parts import UUID, bind
from notification_service.tables import in_app_changes, inbox, notifications
from servicekit import arrays
from servicekit.database import Connection, sql
from tidings.notifications.v1 import notifications_pb2

# With the user's id it names the lock of that user's inbox.
_LOCK_SEED = 0x7469_6469_6E67_7304
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%(user_id)s::uuid::text, %(seed)s))"

# A change of all up to a position commits after so many: nothing waits for it long.
_PAGE = 1000

_note = notifications.c
# Written out as the partial indexes have it.
_IN_APP: ColumnElement[bool] = text("'in_app' = ANY (channels)")  # type: ignore[assignment] # what stands in an index
_USER, _BEFORE, _LIMIT = bind("user_id", UUID), bind("before", BigInteger()), bind("most", Integer())
_of_user = and_(_IN_APP, _note.user_id == _USER)
# Ordered scans compare and order by both columns of the indexes. With an equal user_id the order would be that of the
# position alone, and the planner would take the index of all positions, past everything that others have got.
_place = tuple_(_note.user_id, _note.position)
_is_kept, _is_archived = _note.archive_time.is_(None), _note.archive_time.is_not(None)
_is_unseen, _is_unread = _note.seen_time.is_(None), _note.read_time.is_(None)

# What each change sets, and of what: the rest is so already.
_CHANGES: Mapping[Change, tuple[Mapping[str, Any], ColumnElement[bool]]] = {
    Change.SEEN: ({"seen_time": func.now()}, _is_unseen),
    Change.READ: (
        {"read_time": func.now(), "seen_time": func.coalesce(_note.seen_time, func.now())},
        _is_unread,
    ),
    Change.UNREAD: ({"read_time": null()}, _note.read_time.is_not(None)),
    Change.ARCHIVE: ({"archive_time": func.now()}, _is_kept),
    Change.UNARCHIVE: ({"archive_time": null()}, _is_archived),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a list selects. `archived` is None for both."""

    unread: bool = False
    unseen: bool = False
    archived: bool | None = False
    category: str = ""


@dataclass(frozen=True, slots=True)
class Counted:
    """The counts of a user and the version of the inbox that they are of."""

    counts: notifications_pb2.InAppCounts
    version: int


@cache
def _list(unread: bool, unseen: bool, archived: bool | None, has_category: bool) -> str:
    conditions: list[ColumnElement[bool]] = [_IN_APP, _note.user_id >= _USER, _place < tuple_(_USER, _BEFORE)]
    if archived is not None:
        conditions.append(_is_archived if archived else _is_kept)
    if unread:
        conditions.append(_is_unread)
    if unseen:
        conditions.append(_is_unseen)
    if has_category:
        conditions.append(_note.category == bind("category", Text()))
    statement = select(*reads.NOTIFICATION_COLUMNS).where(*conditions)
    return sql(statement.order_by(_note.user_id.desc(), _note.position.desc()).limit(_LIMIT))


def _count(*conditions: ColumnElement[bool]) -> Any:
    return select(func.count()).select_from(notifications).where(_of_user, _is_kept, *conditions).scalar_subquery()


# One statement, hence of one moment.
_COUNTS = sql(
    select(
        _count(),
        _count(_is_unseen),
        _count(_is_unread),
        func.coalesce(select(inbox.c.notification_position).scalar_subquery(), literal_column("0")),
        func.coalesce(
            select(in_app_changes.c.version).where(in_app_changes.c.user_id == _USER).scalar_subquery(),
            literal_column("0"),
        ),
    )
)
_VERSIONS = sql(
    select(in_app_changes.c.user_id, in_app_changes.c.version).where(
        in_app_changes.c.user_id == any_(bind("users", ARRAY(UUID)))
    )
)
_first = upsert(in_app_changes).values(user_id=_USER, version=literal_column("1"))
_COUNT_UP = sql(
    _first.on_conflict_do_update(
        index_elements=["user_id"], set_={"version": in_app_changes.c.version + literal_column("1")}
    )
)

_IDS = bind("ids", ARRAY(UUID))
_KNOWN = sql(select(_note.id).where(_of_user, _note.id == any_(_IDS)))


@cache
def _change_ids(change: Change) -> str:
    values, is_open = _CHANGES[change]
    return sql(update(notifications).where(_of_user, _note.id == any_(_IDS), is_open).values(values))


@cache
def _change_page(change: Change) -> str:
    """One page of what is to be changed: its last position, null if it is empty, and how many were changed."""
    values, is_open = _CHANGES[change]
    page = (
        select(_note.id, _note.position)
        .where(
            _IN_APP,
            _is_archived if change is Change.UNARCHIVE else _is_kept,
            is_open,
            _place > tuple_(_USER, bind("after", BigInteger())),
            _place <= tuple_(_USER, bind("upto", BigInteger())),
        )
        .order_by(_note.user_id, _note.position)
        .limit(_LIMIT)
        .cte("page")
    )
    changed = update(notifications).where(_note.id == page.c.id).values(values).returning(_note.position).cte("changed")
    return sql(select(func.max(changed.c.position), func.count()).select_from(changed))


async def list_notifications(
    connection: Connection, user_id: uuid.UUID, wanted: Wanted, before: int, most: int
) -> list[notifications_pb2.Notification]:
    """In-app notifications of a user below a position, newest first."""
    statement = _list(wanted.unread, wanted.unseen, wanted.archived, bool(wanted.category))
    values: dict[str, Any] = {"user_id": user_id, "before": before, "most": most}
    if wanted.category:
        values["category"] = wanted.category
    cursor = await connection.execute(statement, values, binary=True)
    return [reads.notification(row) for row in await cursor.fetchall()]


async def counts(connection: Connection, user_id: uuid.UUID) -> Counted:
    """The counts of a user."""
    row = await (await connection.execute(_COUNTS, {"user_id": user_id}, binary=True)).fetchone()
    if row is None:
        raise LookupError("a statement of counts has no row")
    total, unseen, unread, position, version = row
    return Counted(notifications_pb2.InAppCounts(total=total, unseen=unseen, unread=unread, position=position), version)


async def versions(connection: Connection, users: Iterable[uuid.UUID]) -> dict[uuid.UUID, int]:
    """The versions of the inboxes of those users whose inbox was ever changed."""
    cursor = await connection.execute(_VERSIONS, {"users": arrays.uuids(list(users))}, binary=True)
    return {row[0]: row[1] for row in await cursor.fetchall()}


async def change(connection: Connection, user_id: uuid.UUID, change: Change, ids: Sequence[uuid.UUID]) -> int:
    """Changes notifications, all of them or none. Returns how many were not so before. Raises UNKNOWN_NOTIFICATION."""
    values = {"user_id": user_id, "ids": arrays.uuids(ids)}
    async with connection.transaction():
        await _lock(connection, user_id)
        # A statement's snapshot is older than the lock it waits for: what is there is read by the next one.
        found = {one for (one,) in await (await connection.execute(_KNOWN, values, binary=True)).fetchall()}
        if missing := [one for one in ids if one not in found]:
            raise errors.unknown_notification(missing)
        changed = (await connection.execute(_change_ids(change), values)).rowcount
        if changed:
            await connection.execute(_COUNT_UP, values)
    return changed


async def change_all(
    connection: Connection, user_id: uuid.UUID, change: Change, upto: int, *, page: int = _PAGE
) -> int:
    """Changes all up to a position, a page in a transaction. Returns how many were not so before.

    Positions become visible in their order, so whoever has seen one has all before it there. Raises INVALID_FIELD for a
    position beyond the head.
    """
    if upto > (head := await reads.head(connection)):
        raise errors.beyond_head(upto, head)
    values = {"user_id": user_id, "upto": upto, "most": page}
    after, changed = 0, 0
    while True:
        async with connection.transaction():
            await _lock(connection, user_id)
            row = await (await connection.execute(_change_page(change), {**values, "after": after})).fetchone()
            if row is None or row[0] is None:
                return changed
            await connection.execute(_COUNT_UP, values)
        after = row[0]
        changed += row[1]


async def _lock(connection: Connection, user_id: uuid.UUID) -> None:
    await connection.execute(_LOCK, {"user_id": user_id, "seed": _LOCK_SEED})
