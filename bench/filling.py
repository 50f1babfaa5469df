"""Fills a log with events as the service would have written them, far faster than by calls.

Each event is decided by `user_service.domain` and encoded by `user_service.events`; a hundred share a commit time, as
of one group commit. Unless a benchmark wants `Changing` users, each is the creation of a user, and the same users come
again after ten thousand events, which saves half of the time and which no reader looks at. Rows go into user_events by
binary COPY; `plain_events` is a copy of that table which the service does not know and so leaves as it is. The users
themselves are not stored.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
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
# Decides the change at a position.
Decide = Callable[[int, domain.Known, domain.Moment], domain.Change]

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
# A row of binary COPY: the number of columns, then each with its length.
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


def _decided(item: domain.Item, known: domain.Known, moment: domain.Moment) -> domain.Change:
    [decision] = domain.decide(domain.Unit((item,), "", "CreateUser"), known, moment)
    assert isinstance(decision, domain.Decision)
    assert decision.change is not None
    return decision.change


def creation(position: int, known: domain.Known, moment: domain.Moment) -> domain.Change:
    """A new user, the same again after some thousands."""
    return _decided(_item(position % _USERS), known, moment)


class Changing:
    """Decides what happens to users in their lives: of ten events seven are creations, two are other addresses of users
    that were created some hundred events before, one is a deletion of such a one. Every user comes once only.
    """

    _YOUNG = 500

    def __init__(self) -> None:
        self._young: deque[users_pb2.User] = deque()
        self._old: deque[users_pb2.User] = deque()

    def __call__(self, position: int, known: domain.Known, moment: domain.Moment) -> domain.Change:
        """The change at a position."""
        if len(self._young) < self._YOUNG or position % 10 not in (3, 6, 9):
            given = user(position)
            item = domain.Item(domain.create(given, dict(given.labels), uuid7(), given.email), None, b"")
            return self._lived(_decided(item, known, moment), moment, self._young)
        if position % 10 == 9 and self._old:
            one = self._old.popleft()
            return self._of(one, domain.Delete(_id(one), 0), known, moment)
        one = self._young.popleft()
        email = f"new-{one.email}"
        update = domain.Update(_id(one), users_pb2.User(email=email), ("email",), email, 0)
        return self._lived(self._of(one, update, known, moment), moment, self._old)

    @staticmethod
    def _lived(change: domain.Change, moment: domain.Moment, ages: deque[users_pb2.User]) -> domain.Change:
        ages.append(users_pb2.User.FromString(change.encoded))
        return change

    @staticmethod
    def _of(
        one: users_pb2.User, mutation: domain.Mutation, known: domain.Known, moment: domain.Moment
    ) -> domain.Change:
        known.rows = {_id(one): domain.Row(one, one.email)}
        return _decided(domain.Item(mutation, None, b""), known, moment)


def _id(one: users_pb2.User) -> bytes:
    return UUID(one.id).bytes


def _events(
    first: int, last: int, begin: datetime, decide: Decide = creation
) -> Iterator[tuple[domain.Change, UUID, datetime, bytes]]:
    """The events at these positions, each with its id, its commit time and its element."""
    known = domain.Known()
    for position in range(first, last + 1):
        if position == first or position % _GROUP == 1:
            moment = domain.moment(begin + timedelta(microseconds=position // _GROUP), _DELETED_KEPT)
            known.usernames.clear()
            known.email_keys.clear()
        change, event_id = decide(position, known, moment), uuid7()
        yield change, event_id, moment.time, events.encode(change, position, str(event_id), moment.encoded, b"")


def elements(first: int, last: int) -> Iterator[bytes]:
    """The elements of the events at these positions."""
    return (element for *_, element in _events(first, last, datetime.now(UTC)))


def _rows(first: int, last: int, begin: datetime, decide: Decide) -> Iterator[bytes]:
    """The rows of the events at these positions, in chunks."""
    rows: list[bytes] = []
    decided = _events(first, last, begin, decide)
    for position, (change, event_id, commit_time, element) in enumerate(decided, first):
        fixed = _ROW.pack(
            10, 8, position, 16, event_id.bytes, 16, change.id, 8, events.shard_hash(change.id),
            2, change.type, 4, domain.field_bits(change.changed_fields), 1, True,
            8, (commit_time - _EPOCH) // _MICROSECOND, len(element),
        )  # fmt: skip
        rows += fixed, element
        if change.previous is None:
            rows.append(_NULL)
        else:
            previous = change.previous.SerializeToString()
            rows += struct.pack("!i", len(previous)), previous
        if position % _CHUNK == 0:
            yield b"".join(rows)
            rows.clear()
    yield b"".join(rows)


async def append(connection: Connection, count: int, decide: Decide = creation) -> int:
    """Adds events in one transaction, under the feed's lock as every writer; returns the head."""
    async with connection.transaction():
        cursor = await connection.execute("SELECT head_position, greatest(head_time, now()) FROM feed FOR UPDATE")
        ((head, now),) = await cursor.fetchall()
        last: int = head + count
        async with connection.cursor().copy(f"COPY user_events ({_COLUMNS}) FROM STDIN (FORMAT binary)") as copy:
            await copy.write(_HEADER)
            for chunk in _rows(head + 1, last, now, decide):
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
