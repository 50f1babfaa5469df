"""The SQL that only reads: users for the API, events and the feed's state for the streams.

Statements are built by SQLAlchemy Core, compiled at import, and run by psycopg on any connection.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from google.protobuf import timestamp_pb2
from psycopg.rows import TupleRow
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    Integer,
    Text,
    any_,
    bindparam,
    cast,
    func,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import UUID

from servicekit import arrays
from servicekit.database import Connection, sql
from tidings.users.v1 import users_pb2
from user_service.events import Entry
from user_service.segments import RECORD_SIZE, identity, nth_record, unpack
from user_service.tables import feed, segments, user_events, users

USER_COLUMNS = tuple(users.c)

_UUID = UUID(as_uuid=True)

_READ_USERS = sql(select(*USER_COLUMNS).where(users.c.id == any_(bindparam("ids", type_=ARRAY(_UUID)))))


def _list_statement(show_deleted: bool, username: bool, email: bool) -> str:
    statement = select(*USER_COLUMNS).where(users.c.id > bindparam("after", type_=_UUID))
    if not show_deleted:
        statement = statement.where(users.c.delete_time.is_(None))
    for column, wanted in ((users.c.username, username), (users.c.email_key, email)):
        if wanted:
            # The operators of text_pattern_ops: a prefix is a range of its index, whatever the collation.
            statement = statement.where(
                column.op("~>=~")(bindparam(f"{column.name}_from", type_=Text())),
                column.op("~<~")(bindparam(f"{column.name}_below", type_=Text())),
            )
    return sql(statement.order_by(users.c.id).limit(bindparam("size", type_=Integer())))


_LIST_USERS = {flags: _list_statement(*flags) for flags in itertools.product((False, True), repeat=3)}


def _bigint(name: str) -> Any:
    return bindparam(name, type_=BigInteger())


def _segment_at(position: Any) -> Any:
    """The first position of the segment that holds a position, if any does."""
    first = segments.alias("earlier").c.first_position
    return select(func.max(first)).where(first <= position).scalar_subquery()


def _nulls(*columns: Column[Any]) -> list[Any]:
    return [cast(null(), column.type) for column in columns]


_DESCRIPTION = (
    user_events.c.event_id,
    user_events.c.group_end,
    user_events.c.commit_time,
    user_events.c.user_id,
    user_events.c.type,
    user_events.c.changed_fields,
)
# Segments and events in one statement, hence one snapshot: of two, the second would miss what is sealed in between. The
# segments are those that begin at or before `within` and hold something after `after`.
_READ_EVENTS = sql(
    union_all(
        select(
            segments.c.first_position.label("position"),
            segments.c.elements,
            segments.c.previous,
            segments.c.records,
            *_nulls(*_DESCRIPTION),
        ).where(
            segments.c.first_position
            >= func.coalesce(_segment_at(_bigint("after") + literal_column("1")), literal_column("0")),
            segments.c.first_position <= _bigint("within"),
            segments.c.last_position > _bigint("after"),
        ),
        select(
            user_events.c.position,
            user_events.c.element,
            user_events.c.previous,
            *_nulls(segments.c.records),
            *_DESCRIPTION,
        ).where(user_events.c.position > _bigint("after"), user_events.c.position <= _bigint("upto")),
    ).order_by("position")
)
# The event that retention removed last is still known: tokens may stand on it.
_READ_IDENTITY = sql(
    union_all(
        select(user_events.c.event_id, user_events.c.commit_time, *_nulls(segments.c.records)).where(
            user_events.c.position == _bigint("position")
        ),
        select(*_nulls(user_events.c.event_id, user_events.c.commit_time), nth_record(_bigint("position"))).where(
            segments.c.first_position == _segment_at(_bigint("position")),
            segments.c.last_position >= _bigint("position"),
        ),
        select(feed.c.edge_event_id, feed.c.edge_time, *_nulls(segments.c.records)).where(
            feed.c.earliest_position == _bigint("position") + literal_column("1"), feed.c.edge_event_id.is_not(None)
        ),
    )
)
_asked = func.unnest(bindparam("positions", type_=ARRAY(BigInteger))).column_valued("asked")
_READ_TIMES = sql(
    select(
        _asked,
        func.coalesce(
            select(user_events.c.commit_time).where(user_events.c.position == _asked).scalar_subquery(),
            select(segments.c.first_time)
            .where(segments.c.first_position <= _asked, segments.c.last_position >= _asked)
            .order_by(segments.c.first_position.desc())
            .limit(literal_column("1"))
            .scalar_subquery(),
        ),
    )
)
_READ_FEED = sql(
    select(feed.c.log_id, feed.c.earliest_position, feed.c.head_position, feed.c.head_time, feed.c.edge_time)
)


@dataclass(frozen=True, slots=True)
class FeedState:
    """The feed's row: identity, first retained position, newest position and its commit time, and the commit time of
    the last event that is no longer retained, if any.
    """

    log_id: uuid.UUID
    earliest: int
    head: int
    head_time: datetime
    edge_time: datetime | None


@dataclass(frozen=True, slots=True)
class Page:
    """Events that follow each other: those at the positions (after, position].

    `elements` are theirs, joined; `event_id` and `group_end` are of the last. `entries` unpacks them all.
    """

    after: int
    position: int
    elements: bytes
    event_id: bytes
    group_end: bool
    entries: Callable[[], list[Entry]]


def stamp(value: datetime) -> timestamp_pb2.Timestamp:
    """A datetime as a message."""
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(value)
    return message


def user_of(row: TupleRow) -> users_pb2.User:
    """The user of a row that begins with USER_COLUMNS."""
    (id_, username, email, _, display_name, locale, time_zone, labels, version, *times) = row[: len(USER_COLUMNS)]
    created, updated, deleted, purged = times
    return users_pb2.User(
        id=str(id_),
        username=username,
        email=email,
        display_name=display_name,
        locale=locale,
        time_zone=time_zone,
        labels=labels,
        version=version,
        create_time=stamp(created),
        update_time=stamp(updated),
        delete_time=stamp(deleted) if deleted else None,
        purge_time=stamp(purged) if purged else None,
    )


async def users_by_id(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, users_pb2.User]:
    """The users of these ids that exist, soft-deleted ones too."""
    cursor = await connection.execute(_READ_USERS, {"ids": arrays.ids(ids)}, binary=True)
    return {row[0].bytes: user_of(row) for row in await cursor.fetchall()}


def _prefix_range(column: str, prefix: str) -> dict[str, str]:
    """`[from, below)` of all texts with a prefix, in the order of code points."""
    below = prefix[:-1] + chr(min(ord(prefix[-1]) + 1, 0x10FFFF))
    if 0xD800 <= ord(below[-1]) <= 0xDFFF:  # surrogates are no characters of a text
        below = prefix[:-1] + "\ue000"
    return {f"{column}_from": prefix, f"{column}_below": below}


async def list_users(
    connection: Connection, after: uuid.UUID, size: int, *, show_deleted: bool, username_prefix: str, email_prefix: str
) -> list[users_pb2.User]:
    """The next `size` users after an id that match, in the order of ids."""
    values: dict[str, Any] = {"after": after, "size": size}
    if username_prefix:
        values |= _prefix_range("username", username_prefix)
    if email_prefix:
        values |= _prefix_range("email_key", email_prefix.casefold())
    statement = _LIST_USERS[(show_deleted, bool(username_prefix), bool(email_prefix))]
    cursor = await connection.execute(statement, values, binary=True)
    return [user_of(row) for row in await cursor.fetchall()]


@asynccontextmanager
async def one_view(connection: Connection) -> AsyncIterator[None]:
    """Everything that is read inside is of one moment, so that nothing is sealed or removed in between."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield


async def _stored(connection: Connection, after: int, within: int, upto: int) -> list[TupleRow]:
    cursor = await connection.execute(_READ_EVENTS, {"after": after, "within": within, "upto": upto}, binary=True)
    return await cursor.fetchall()


def _entry(row: TupleRow) -> Entry:
    position, element, previous, _, event_id, group_end, commit_time, user_id, kind, fields = row
    return Entry(position, event_id.bytes, group_end, commit_time, element, previous, user_id.bytes, kind, fields)


async def events(connection: Connection, after: int, upto: int) -> list[Entry]:
    """The events at the positions (after, upto], in order."""
    found: list[Entry] = []
    for row in await _stored(connection, after, upto, upto):
        first, elements, previous, records, *_ = row
        if records is None:
            found.append(_entry(row))
        else:
            found += [one for one in unpack(first, elements, previous, records) if after < one.position <= upto]
    return found


async def page(connection: Connection, after: int, upto: int) -> Page | None:
    """What follows a position: the rest of its segment, all of it if it begins there; or, where nothing is sealed yet,
    the events up to `upto`. None if any of that is not there.
    """
    rows = await _stored(connection, after, after + 1, upto)
    if rows and rows[0][3] is not None:
        first, elements, previous, records, *_ = rows[0]
        unpacked = partial(unpack, first, elements, previous, records)
        if first == after + 1:
            last = first + len(records) // RECORD_SIZE - 1
            return Page(after, last, elements, identity(records[-RECORD_SIZE:])[0], True, unpacked)
        entries = unpacked()[after + 1 - first :]
    else:
        entries = [_entry(row) for row in rows]
        if len(entries) != upto - after or entries[0].position != after + 1 or entries[-1].position != upto:
            return None
    end = entries[-1]
    elements = b"".join([entry.element for entry in entries])
    return Page(after, end.position, elements, end.event_id, end.group_end, lambda: entries)


async def _identity(connection: Connection, position: int) -> tuple[bytes, datetime] | None:
    cursor = await connection.execute(_READ_IDENTITY, {"position": position}, binary=True)
    row = await cursor.fetchone()
    if row is None:
        return None
    event_id, committed, record = row
    return (event_id.bytes, committed) if record is None else identity(record)


async def event_id(connection: Connection, position: int) -> bytes | None:
    """The id of the event at a position, also of the one right before the earliest; None if there is none."""
    found = await _identity(connection, position)
    return found[0] if found else None


async def commit_time(connection: Connection, position: int) -> datetime | None:
    """When the event at a position was committed, also the one right before the earliest; None if there is none."""
    found = await _identity(connection, position)
    return found[1] if found else None


async def first_since(connection: Connection, time: datetime, state: FeedState) -> int:
    """The position of the first event committed at or after a time; the head's + 1 if there is none.

    Commit times never fall along the log: a bisection by position, which needs no index on them.
    """
    low, high = state.earliest, state.head + 1
    while low < high:
        middle = (low + high) // 2
        committed = await commit_time(connection, middle)
        if committed is None or committed < time:
            low = middle + 1
        else:
            high = middle
    return low


async def feed_state(connection: Connection) -> FeedState:
    """The feed's row."""
    cursor = await connection.execute(_READ_FEED, binary=True)
    row = await cursor.fetchone()
    if row is None:
        raise LookupError("the feed's row is missing: the schema is not complete")
    return FeedState(*row)


async def commit_times(connection: Connection, positions: Sequence[int]) -> dict[int, float]:
    """When events were committed, in seconds since 1970; of one in a segment, when the segment's first was. Of those
    that are not retained nothing is said.
    """
    cursor = await connection.execute(_READ_TIMES, {"positions": arrays.bigints(positions)}, binary=True)
    return {position: time.timestamp() for position, time in await cursor.fetchall() if time is not None}
