"""The SQL that only reads: users for the API, events and the feed's state for the streams.

Statements are built by SQLAlchemy Core, compiled at import, and run by psycopg on any connection.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf import timestamp_pb2
from psycopg.rows import TupleRow
from sqlalchemy import ARRAY, BigInteger, Integer, Text, any_, bindparam, select
from sqlalchemy.dialects.postgresql import UUID

from servicekit import arrays
from servicekit.database import Connection, sql
from tidings.users.v1 import users_pb2
from user_service.events import Entry
from user_service.tables import feed, user_events, users

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

_READ_EVENTS = sql(
    select(
        user_events.c.position,
        user_events.c.event_id,
        user_events.c.group_end,
        user_events.c.commit_time,
        user_events.c.element,
        user_events.c.previous,
        user_events.c.user_id,
        user_events.c.type,
        user_events.c.changed_fields,
    )
    .where(
        user_events.c.position > bindparam("after", type_=BigInteger()),
        user_events.c.position <= bindparam("upto", type_=BigInteger()),
    )
    .order_by(user_events.c.position)
)
_READ_EVENT_ID = sql(
    select(user_events.c.event_id).where(user_events.c.position == bindparam("position", type_=BigInteger()))
)
_READ_COMMIT_TIME = sql(
    select(user_events.c.commit_time).where(user_events.c.position == bindparam("position", type_=BigInteger()))
)
_READ_FEED = sql(select(feed.c.log_id, feed.c.earliest_position, feed.c.head_position, feed.c.head_time))


@dataclass(frozen=True, slots=True)
class FeedState:
    """The feed's row: identity, first retained position, newest position and its commit time."""

    log_id: uuid.UUID
    earliest: int
    head: int
    head_time: datetime


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


async def events(connection: Connection, after: int, upto: int) -> list[Entry]:
    """The events at the positions (after, upto], in order."""
    cursor = await connection.execute(_READ_EVENTS, {"after": after, "upto": upto}, binary=True)
    rows = await cursor.fetchall()
    return [
        Entry(position, event_id.bytes, group_end, commit_time, element, previous, user_id.bytes, kind, fields)
        for position, event_id, group_end, commit_time, element, previous, user_id, kind, fields in rows
    ]


async def event_id(connection: Connection, position: int) -> bytes | None:
    """The id of the event at a position; None if there is none."""
    cursor = await connection.execute(_READ_EVENT_ID, {"position": position}, binary=True)
    row = await cursor.fetchone()
    return row[0].bytes if row else None


async def commit_time(connection: Connection, position: int) -> datetime | None:
    """When the event at a position was committed; None if there is none."""
    cursor = await connection.execute(_READ_COMMIT_TIME, {"position": position}, binary=True)
    row = await cursor.fetchone()
    return row[0] if row else None


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
