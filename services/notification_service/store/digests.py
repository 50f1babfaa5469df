"""The SQL of digests: what is gathered with a batch of events, and how windows that are over are closed.

What is gathered is stored in the inbox's transaction. There the digests of the users concerned are locked before the
inbox's row, and whoever closes digests locks them in this order, too.

A digest is closed in two steps, each a transaction of its own. `take` gives due ones to this process for a while, and
nothing goes into them from then on. `close` stores what they became and marks them closed; those that somebody else
has closed or cancelled meanwhile it leaves alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Float,
    Integer,
    Select,
    SmallInteger,
    Text,
    any_,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from notification_service.domain import DigestState, Notification, stamp
from notification_service.store import writes
from notification_service.store.parts import SECOND, TIME, UUID, bind, is_free, number, rows
from notification_service.tables import digest_items, digests, notifications
from notification_service.windows import Gathered, Window
from servicekit import arrays
from servicekit.database import Connection, sql
from tidings.notifications.v1 import digests_pb2

_digest, _item, _note = digests.c, digest_items.c, notifications.c
_is_open = _digest.state == number(DigestState.OPEN)
_ids = bind("ids", ARRAY(UUID))

_WINDOW = (
    "id", "user_id", "name", "target", "category", "template", "locale", "time_zone", "gathers", "items", "open_time",
    "close_time", "event_id", "event_position", "trace_parent", "trace_state",
)  # fmt: skip
_window_columns = tuple(_digest[name] for name in _WINDOW)

_NOW = sql(select(func.now()))
_LOCK_OPEN = sql(
    select(*_window_columns)
    .where(_is_open, _digest.user_id == any_(bind("users", ARRAY(UUID))))
    .order_by(_digest.id)
    .with_for_update()
)

_given = rows(
    w_id=UUID,
    w_user_id=UUID,
    w_name=Text(),
    w_target=Text(),
    w_category=Text(),
    w_template=Text(),
    w_locale=Text(),
    w_time_zone=Text(),
    w_gathers=Boolean(),
    w_items=Integer(),
    w_open_time=TIME,
    w_close_time=TIME,
    w_event_id=UUID,
    w_event_position=BigInteger(),
    w_trace_parent=Text(),
    w_trace_state=Text(),
    w_state=SmallInteger(),
    w_end_reason=Text(),
)
_end_time = case((_given.c.w_state != number(DigestState.OPEN), func.now()))
_OPEN = sql(
    insert(digests).from_select(
        [*(column.name.removeprefix("w_") for column in _given.c), "end_time"], select(*_given.c, _end_time)
    )
)
_CHANGED = ("category", "template", "locale", "time_zone", "gathers", "items", "close_time", "state", "end_reason")
_CHANGE = sql(
    update(digests)
    .where(_digest.id == _given.c.w_id)
    .values({**{name: _given.c[f"w_{name}"] for name in _CHANGED}, "end_time": _end_time})
)
_placed = rows(p_digest_id=UUID, p_number=Integer(), p_notification_id=UUID, p_view=Text())
_PLACE = sql(
    insert(digest_items).from_select(
        ["digest_id", "number", "notification_id", "view"],
        select(_placed.c.p_digest_id, _placed.c.p_number, _placed.c.p_notification_id, cast(_placed.c.p_view, JSON)),
    )
)

# Nothing goes in any more, and it is this process's for a while.
_taking = {"gathers": literal_column("false"), "lease_until": func.now() + bind("lease", Float()) * SECOND}
_due = (
    select(_digest.id)
    .where(_is_open, _digest.close_time <= func.now(), is_free(_digest))
    .order_by(_digest.close_time)
    .limit(bind("most", Integer()))
    .with_for_update(skip_locked=True)
    .cte("due")
)
_TAKE = sql(update(digests).where(_digest.id == _due.c.id).values(_taking).returning(*_window_columns))
_FLUSH = sql(
    update(digests)
    .where(_digest.id == bind("id", UUID), _is_open, is_free(_digest))
    .values({**_taking, "close_time": func.least(_digest.close_time, func.now())})
    .returning(*_window_columns)
)
_ITEMS = sql(
    select(_item.digest_id, cast(_item.view, Text))
    .where(_item.digest_id == any_(_ids))
    .order_by(_item.digest_id, _item.number)
)
_LOCK_TAKEN = sql(select(_digest.id).where(_is_open, _digest.id == any_(_ids)).order_by(_digest.id).with_for_update())
_RULES = sql(
    select(_note.event_id, _note.rule).where(
        _note.event_id == any_(bind("events", ARRAY(UUID))), _note.rule.like(literal_column("'digest:%'"))
    )
)
_became = rows(b_digest_id=UUID, b_notification_id=UUID)
_CLOSE = sql(
    update(digests)
    .where(_digest.id == _became.c.b_digest_id)
    .values(
        state=number(DigestState.CLOSED),
        notification_id=_became.c.b_notification_id,
        end_time=func.now(),
        lease_until=null(),
    )
)

_STANDING = sql(select(func.count(), func.extract("epoch", func.now() - func.min(_digest.close_time))).where(_is_open))

_item_ids = (
    select(func.array_agg(aggregate_order_by(_item.notification_id, _item.number)))
    .where(_item.digest_id == _digest.id)
    .scalar_subquery()
)
_COLUMNS = (
    _digest.position, _digest.id, _digest.user_id, _digest.name, _digest.target, _digest.category, _digest.template,
    _digest.locale, _digest.time_zone, _digest.state, _digest.gathers, _digest.open_time, _digest.close_time,
    _digest.end_time, _digest.end_reason, _digest.notification_id, _item_ids,
)  # fmt: skip
_FIND = sql(select(*_COLUMNS).where(_digest.id == bind("id", UUID)))


async def lock_open(connection: Connection, users: Collection[uuid.UUID]) -> tuple[list[Window], datetime]:
    """In the inbox's transaction: the open digests of users, locked, and the time."""
    found = await connection.execute(_LOCK_OPEN, {"users": arrays.uuids(list(users))}, binary=True)
    opened = [Window(*row) for row in await found.fetchall()]
    row = await (await connection.execute(_NOW, binary=True)).fetchone()
    if row is None:
        raise LookupError("the time has no row")
    return opened, row[0]


async def write(connection: Connection, made: Gathered) -> None:
    """In the inbox's transaction, before its row is locked: stores what a batch makes of the digests."""
    # First what takes no more items, so that another may be opened in its place.
    for statement, windows in ((_CHANGE, made.changed), (_OPEN, made.opened)):
        if windows:
            await connection.execute(statement, _window_arrays(windows))
    if made.placed:
        values = {
            "p_digest_id": arrays.uuids([one.digest_id for one in made.placed]),
            "p_number": arrays.integers([one.number for one in made.placed]),
            "p_notification_id": arrays.uuids([one.notification_id for one in made.placed]),
            "p_view": arrays.texts([one.view for one in made.placed]),
        }
        await connection.execute(_PLACE, values)


def _window_arrays(windows: Sequence[Window]) -> dict[str, arrays.Array]:
    return {
        "w_id": arrays.uuids([one.id for one in windows]),
        "w_user_id": arrays.uuids([one.user_id for one in windows]),
        "w_name": arrays.texts([one.name for one in windows]),
        "w_target": arrays.texts([one.target for one in windows]),
        "w_category": arrays.texts([one.category for one in windows]),
        "w_template": arrays.texts([one.template for one in windows]),
        "w_locale": arrays.texts([one.locale for one in windows]),
        "w_time_zone": arrays.texts([one.time_zone for one in windows]),
        "w_gathers": arrays.booleans([one.gathers for one in windows]),
        "w_items": arrays.integers([one.items for one in windows]),
        "w_open_time": arrays.times([one.open_time for one in windows]),
        "w_close_time": arrays.times([one.close_time for one in windows]),
        "w_event_id": arrays.uuids([one.event_id for one in windows]),
        "w_event_position": arrays.bigints([one.event_position for one in windows]),
        "w_trace_parent": arrays.texts([one.trace_parent for one in windows]),
        "w_trace_state": arrays.texts([one.trace_state for one in windows]),
        "w_state": arrays.smallints([one.state for one in windows]),
        "w_end_reason": arrays.texts([one.end_reason for one in windows]),
    }


async def take(connection: Connection, most: int, lease: float) -> list[Window]:
    """Takes at most so many due digests for `lease` seconds."""
    found = await connection.execute(_TAKE, {"most": most, "lease": lease}, binary=True)
    return [Window(*row) for row in await found.fetchall()]


async def flush(connection: Connection, identity: uuid.UUID, lease: float) -> Window | None:
    """Makes an open digest due and takes it for `lease` seconds; None if it is not open, or somebody has it."""
    found = await connection.execute(_FLUSH, {"id": identity, "lease": lease}, binary=True)
    row = await found.fetchone()
    return Window(*row) if row else None


async def items(connection: Connection, taken: Collection[uuid.UUID]) -> dict[uuid.UUID, list[str]]:
    """What was gathered by digests, in its order, as JSON."""
    views: dict[uuid.UUID, list[str]] = {identity: [] for identity in taken}
    for identity, view in await (await connection.execute(_ITEMS, {"ids": arrays.uuids(list(taken))})).fetchall():
        views[identity].append(view)
    return views


async def close(connection: Connection, made: Sequence[Notification]) -> int:
    """Stores what digests became and marks them closed, in one transaction; those that are not open any more are left
    alone. Returns how many were closed. Raises psycopg's UniqueViolation if somebody else closes at this moment one
    that began with the same event: to be tried again.
    """
    by_digest = {one.digest_id: one for one in made if one.digest_id is not None}
    async with connection.transaction():
        found = await connection.execute(_LOCK_TAKEN, {"ids": arrays.uuids(list(by_digest))})
        still = [by_digest[identity] for (identity,) in await found.fetchall()]
        if not still:
            return 0
        events = arrays.uuids([one.event_id for one in still])
        taken = await (await connection.execute(_RULES, {"events": events})).fetchall()
        apart = _told_apart(still, [(event, rule) for event, rule in taken])
        values = {
            "b_digest_id": arrays.nullable_uuids([one.digest_id for one in apart]),
            "b_notification_id": arrays.uuids([one.id for one in apart]),
        }
        await connection.execute(_CLOSE, values)
        await writes.write_made(connection, apart)
    return len(apart)


def _told_apart(made: Sequence[Notification], taken: Sequence[tuple[uuid.UUID, str]]) -> list[Notification]:
    """The notifications with rules that no other of the same event has: two digests may begin with one event, each of
    another address. `taken` are events and rules that there are.
    """
    known, apart = set(taken), []
    for one in made:
        rule = one.rule
        if (one.event_id, rule) in known:
            rule = f"{rule}:{str(one.digest_id)[:8]}"
        known.add((one.event_id, rule))
        apart.append(replace(one, rule=rule))
    return apart


async def standing(connection: Connection) -> tuple[int, float]:
    """How many digests are open, and for how many seconds the one that is due the longest has been so."""
    row = await (await connection.execute(_STANDING)).fetchone()
    return (row[0], max(float(row[1] or 0), 0.0)) if row else (0, 0.0)


@cache
def _list(names: frozenset[str], state: int | None) -> str:
    statement: Select[Any] = select(*_COLUMNS).where(_digest.position < bindparam("before", type_=BigInteger))
    if state is not None:
        # Written out: a parameter could not be told to be within what a partial index has.
        statement = statement.where(_digest.state == number(state))
    for name in sorted(names):
        given = bindparam(name, type_=_digest[name].type)
        if name == "notification_id":
            with_it = select(_item.digest_id).where(_item.notification_id == given)
            statement = statement.where(or_(_digest.notification_id == given, _digest.id.in_(with_it)))
        else:
            statement = statement.where(_digest[name] == given)
    return sql(statement.order_by(_digest.position.desc()).limit(bindparam("most", type_=Integer)))


async def page(
    connection: Connection, filters: Mapping[str, Any], before: int, most: int
) -> list[tuple[int, digests_pb2.Digest]]:
    """Digests below a position with their positions, the newest first; filters are by column."""
    bound = {name: value for name, value in filters.items() if name != "state"}
    statement = _list(frozenset(bound), filters.get("state"))
    found = await connection.execute(statement, {**bound, "before": before, "most": most}, binary=True)
    return [(row[0], _message(row)) for row in await found.fetchall()]


async def find(connection: Connection, identity: uuid.UUID) -> digests_pb2.Digest | None:
    """One digest."""
    row = await (await connection.execute(_FIND, {"id": identity}, binary=True)).fetchone()
    return _message(row) if row else None


def _message(row: tuple[Any, ...]) -> digests_pb2.Digest:
    _, identity, user_id, name, target, category, template, locale, time_zone, state, gathers, *rest = row
    open_time, close_time, end_time, end_reason, notification_id, item_ids = rest
    return digests_pb2.Digest(
        id=str(identity),
        user_id=str(user_id),
        name=name,
        target=target,
        category=category,
        template=template,
        locale=locale,
        time_zone=time_zone,
        state=state,
        gathers=gathers and state == DigestState.OPEN,
        open_time=stamp(open_time),
        close_time=stamp(close_time),
        end_time=stamp(end_time),
        end_reason=end_reason,
        notification_id=str(notification_id) if notification_id else "",
        item_notification_ids=[str(one) for one in item_ids or ()],
    )
