"""Fills a log with events as the service would have written them, far faster than by calls.

Each event is the creation of a user, decided by `user_service.domain` and encoded by `user_service.events`; a hundred
share a commit time, as of one group commit, and the same users come again after ten thousand events, which saves half
of the time and which no reader looks at. Rows go into user_events by binary COPY; `plain_events` is a copy of that
table which the service does not know and so leaves as it is. The users themselves are not stored.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import LiteralString

from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from uuid_utils import UUID, uuid7

from tidings.users.v1 import users_pb2
from user_service import domain, events

PLAIN = "plain_events"

Connection = AsyncConnection[TupleRow]

_USERS = 10_000
_GROUP = 100
_CHUNK = 10_000
_TRANSACTION = 250_000
# The newest events stay rows for a while; no log that is measured is so short that it matters.
_UNSEALED = 20_000
_DELETED_KEPT = timedelta(days=30)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
# A row of binary COPY: the number of columns, then each with its length; `previous` is NULL.
_ROW = struct.Struct("!hiqi16si16siqihiii?iqi")
_NULL = struct.pack("!i", -1)
_COLUMNS = "position, event_id, user_id, shard_hash, type, changed_fields, group_end, commit_time, element, previous"


def user(number: int) -> users_pb2.User:
    """A user as a caller gives it."""
    name = f"user-{number:09d}"
    return users_pb2.User(
        username=name,
        email=f"{name}@example.com",
        display_name="Αθηνά Παπαδοπούλου",
        locale="el-GR",
        time_zone="Europe/Athens",
        labels={"team": "red"},
    )


@lru_cache(maxsize=_USERS)
def _item(number: int) -> domain.Item:
    given = user(number)
    return domain.Item(domain.create(given, dict(given.labels), uuid7(), given.email), None, b"")


def _events(first: int, last: int, begin: datetime) -> Iterator[tuple[domain.Change, UUID, datetime, bytes]]:
    """The events at these positions, each with its id, its commit time and its element."""
    known = domain.Known()
    for position in range(first, last + 1):
        if position == first or position % _GROUP == 1:
            moment = domain.moment(begin + timedelta(microseconds=position // _GROUP), _DELETED_KEPT)
            known.usernames.clear()
            known.email_keys.clear()
        item, event_id = _item(position % _USERS), uuid7()
        [decision] = domain.decide(domain.Unit((item,), "", "CreateUser"), known, moment)
        assert isinstance(decision, domain.Decision)
        change = decision.change
        assert change is not None
        yield change, event_id, moment.time, events.encode(change, position, str(event_id), moment.encoded, b"")


def elements(first: int, last: int) -> Iterator[bytes]:
    """The elements of the events at these positions."""
    return (element for *_, element in _events(first, last, datetime.now(UTC)))


def _rows(first: int, last: int, begin: datetime) -> Iterator[bytes]:
    """The rows of the events at these positions, in chunks."""
    rows: list[bytes] = []
    for position, (change, event_id, commit_time, element) in enumerate(_events(first, last, begin), first):
        fixed = _ROW.pack(
            10, 8, position, 16, event_id.bytes, 16, change.id, 8, events.shard_hash(change.id),
            2, change.type, 4, domain.field_bits(change.changed_fields), 1, True,
            8, (commit_time - _EPOCH) // _MICROSECOND, len(element),
        )  # fmt: skip
        rows += fixed, element, _NULL
        if position % _CHUNK == 0:
            yield b"".join(rows)
            rows.clear()
    yield b"".join(rows)


async def append(connection: Connection, count: int) -> int:
    """Adds events in one transaction, under the feed's lock as every writer; returns the head."""
    async with connection.transaction():
        cursor = await connection.execute("SELECT head_position, greatest(head_time, now()) FROM feed FOR UPDATE")
        ((head, now),) = await cursor.fetchall()
        last: int = head + count
        async with connection.cursor().copy(f"COPY user_events ({_COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
            await copy.write(_HEADER)
            for chunk in _rows(head + 1, last, now):
                await copy.write(chunk)
            await copy.write(_TRAILER)
        await connection.execute(
            "UPDATE feed SET (head_position, head_time) ="
            " (SELECT position, commit_time FROM user_events ORDER BY position DESC LIMIT 1)"
        )
        # What replicas tell each other after a commit.
        await connection.execute("SELECT pg_notify('tidings_feed', %s)", [str(last)])
    return last


async def fill(url: str, count: int, *, plain: bool = False) -> None:
    """Brings a fresh log to `count` events, and tells how far it is. With `plain` a copy of the table is made."""
    async with await AsyncConnection.connect(url, autocommit=True) as connection:
        begun, head = time.monotonic(), 0
        while head < count:
            head = await append(connection, min(_TRANSACTION, count - head))
            _tell(f"{head:,} of {count:,} events, {head / (time.monotonic() - begun):,.0f} a second")
        if plain:
            _tell(f"a copy of {count:,} events")
            await connection.execute(f"CREATE TABLE {PLAIN} (LIKE user_events INCLUDING ALL)")
            await connection.execute(f"INSERT INTO {PLAIN} SELECT * FROM user_events ORDER BY position")
            await connection.execute(f"VACUUM (ANALYZE) {PLAIN}")
        await connection.execute("VACUUM (ANALYZE) user_events")
        await connection.execute("CHECKPOINT")


async def sealed(url: str) -> None:
    """Waits until the service that runs on a log has sealed what it does not leave as rows, if it seals at all."""
    async with await AsyncConnection.connect(url, autocommit=True) as connection:
        ((seals, head),) = await _rows_of(
            connection, "SELECT to_regclass('segments') IS NOT NULL, head_position FROM feed"
        )
        done = 0
        while seals and done < head - _UNSEALED:
            await asyncio.sleep(1)
            found = await _rows_of(
                connection, "SELECT last_position FROM segments ORDER BY first_position DESC LIMIT 1"
            )
            done = found[0][0] if found else 0
            _tell(f"{done:,} of {head:,} events are sealed")
        await connection.execute("CHECKPOINT")


async def _rows_of(connection: Connection, query: LiteralString) -> list[TupleRow]:
    return await (await connection.execute(query)).fetchall()


async def bodies(url: str) -> AsyncIterator[list[bytes]]:
    """The events of the plain copy in order, each a serialized UserEvent, in parts."""
    query = f"SELECT element FROM {PLAIN} WHERE position > %s AND position <= %s ORDER BY position"
    async with await AsyncConnection.connect(url, autocommit=True) as connection:
        after = 0
        while True:
            cursor = await connection.execute(query, [after, after + _CHUNK], binary=True)
            elements = [row[0] for row in await cursor.fetchall()]
            if not elements:
                return
            yield [_body(element) for element in elements]
            after += len(elements)


def _body(element: bytes) -> bytes:
    (event,) = users_pb2.WatchUsersResponse.FromString(element).events
    return event.SerializeToString()


def _tell(text: str) -> None:
    sys.stderr.write(f"# filling: {text}\n")
