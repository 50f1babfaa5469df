"""Builds the messages that carry events, each once, and shares them among the streams that want the same.

Streams that are live at the same position and streams that catch up through the same pages ask for the same message; it
is kept under where it starts and ends and what it selects. Older events come from Postgres in pages cut at fixed
positions, which streams of every selection share. Every page is checked: it must hold each position that was asked
for, for all of them are known to be committed.

A message passes everything up to where its token stands, the selected and the rest. Of a scan in which nothing is
selected there is a message too, without bytes: it says how far the stream is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import psycopg

from servicekit import logs
from servicekit.database import Connection, Pool
from user_service import errors, events, reads, tokens
from user_service.events import Entry
from user_service.selection import Selection
from user_service.window import Window

log = logs.get(__name__)

# Where pages of older events are cut.
PAGE = 1000
# A scan for selected events in the window looks at this many at least, however few fit into a message.
_LEAST_SCAN = 100
# What a kept message costs besides its bytes, roughly.
_OVERHEAD = 500


class BrokenLogError(Exception):
    """The log lacks a position that is committed and retained. Nothing may be sent past it."""


class Message(NamedTuple):
    """A finished message: `data` is its elements, `body` bytes, and a tail that goes from `previous_position` to
    `position`, with its token ("" inside an atomic group). `scanned` is where the next one begins.

    Without `data` nothing was selected; `position` then is where the token stands, if there is one.
    """

    data: bytes
    body: int
    previous_position: int
    position: int
    token: str
    scanned: int

    def following(self, sent: int) -> bytes:
        """Its bytes for a stream whose last message went to `sent`."""
        if sent == self.previous_position:
            return self.data
        return self.data[: self.body] + events.tail(self.token, sent, self.position)


class _Key(NamedTuple):
    after: int
    upto: int
    max_batch: int
    include_previous: bool
    selection: bytes


class Messages:
    """The messages of one log. Use from one event loop."""

    def __init__(self, log_id: uuid.UUID, pool: Pool, window: Window, *, readers: int, cache_bytes: int) -> None:
        self._log_id = log_id
        self._pool = pool
        self._window = window
        self._readers = asyncio.Semaphore(readers)
        self._cache: OrderedDict[_Key, Message] = OrderedDict()
        self._cache_bytes = 0
        self._cache_limit = cache_bytes
        self._reading: dict[tuple[int, int], asyncio.Task[list[Entry]]] = {}
        self.broken = False

    async def after(self, position: int, selection: Selection, max_batch: int, include_previous: bool) -> Message:
        """The message that follows a position below the window's head.

        Raises POSITION_EXPIRED, DATABASE_UNAVAILABLE, or BrokenLogError.
        """
        live = self._window.covers(position)
        end = self._window.head if live else min(self._window.head, position // PAGE * PAGE + PAGE)
        size = max_batch
        if selection.digest:
            size = min(max(max_batch, _LEAST_SCAN), PAGE) if live else PAGE
        key = _Key(position, min(end, position + size), max_batch, include_previous, selection.digest)
        message = self._cache.get(key)
        if message is not None:
            self._cache.move_to_end(key)
            return message
        if live:
            entries = self._window.after(position, key.upto - position)
            message = next(self._build(key, selection, entries))
            self._keep(key, message)
            return message
        entries = await self._page(key.after, key.upto)
        # Another stream may have built it after the same read.
        message = self._cache.get(key)
        if message is None:
            built = list(self._build(key, selection, entries))
            after = key.after
            for one in built:
                self._keep(key._replace(after=after), one)
                after = one.scanned
            message = built[0]
        return message

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[Connection]:
        """A connection for what streams read besides the newest events: a bounded number of them, in turn. Raises
        DATABASE_UNAVAILABLE.
        """
        async with self._readers:
            try:
                async with self._pool.connection() as connection:
                    yield connection
            except psycopg.OperationalError as error:
                raise errors.database_unavailable() from error

    async def _page(self, after: int, upto: int) -> list[Entry]:
        # Streams that want the same page share one read, which goes on if the one that began it is cancelled.
        reading = self._reading.get((after, upto))
        if reading is None:
            reading = asyncio.create_task(self._read(after, upto))
            self._reading[after, upto] = reading
            reading.add_done_callback(lambda _: self._reading.pop((after, upto), None))
        return await asyncio.shield(reading)

    async def _read(self, after: int, upto: int) -> list[Entry]:
        async with self.reader() as connection:
            entries = await reads.events(connection, after, upto)
            if not _is_whole(entries, after, upto):
                entries = await reads.events(connection, after, upto)
            if not _is_whole(entries, after, upto):
                state = await reads.feed_state(connection)
                if after + 1 < state.earliest:
                    raise errors.position_expired(after, state.earliest)
                self.broken = True
                log.error("the log has a hole", after=after, upto=upto, read=len(entries))
                raise BrokenLogError(f"positions ({after}, {upto}] are not all there")
        return entries

    def _build(self, key: _Key, selection: Selection, entries: list[Entry]) -> Iterator[Message]:
        """Cuts entries into messages, one at least: the first follows `key.after`, the last has scanned `key.upto`."""
        chosen = selection.select(entries)
        previous, scanned = key.after, key.after
        while chosen or scanned < key.upto:
            count = events.cut(chosen[: key.max_batch], key.include_previous)
            part, chosen = chosen[:count], chosen[count:]
            first = part[-1].position if part else scanned + 1
            scanned = chosen[0].position - 1 if chosen else key.upto
            rest = _resting_place(entries[first - key.after - 1 : scanned - key.after])
            token = self._token(rest, selection) if rest.group_end else ""
            data, body = b"", 0
            if part:
                elements = events.join(part, key.include_previous)
                tail = events.tail(token, previous, rest.position)
                data = b"".join([*elements, tail])
                body = len(data) - len(tail)
            yield Message(data, body, previous, rest.position, token, scanned)
            previous = rest.position

    def _token(self, entry: Entry, selection: Selection) -> str:
        seen = tokens.event_hash(entry.event_id)
        return tokens.encode(tokens.ResumeToken(self._log_id, entry.position, seen, selection.short))

    def _keep(self, key: _Key, message: Message) -> None:
        if key in self._cache:
            return
        self._cache[key] = message
        self._cache_bytes += len(message.data) + _OVERHEAD
        while self._cache_bytes > self._cache_limit and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= len(dropped.data) + _OVERHEAD


def _resting_place(entries: Sequence[Entry]) -> Entry:
    """The last event after which a token may stand; the last of all if there is none."""
    for entry in reversed(entries):
        if entry.group_end:
            return entry
    return entries[-1]


def _is_whole(entries: list[Entry], after: int, upto: int) -> bool:
    positions = range(after + 1, upto + 1)
    return len(entries) == len(positions) and all(
        entry.position == position for entry, position in zip(entries, positions, strict=True)
    )
