"""Builds the messages that carry events, each once, and shares them among the streams that want the same.

Streams that are live at the same position and streams that catch up through the same pages ask for the same message; it
is kept under where it starts and ends and what it selects. Older events come from Postgres in pages (a segment, or what
is cut at fixed positions) which streams of every selection share; a whole segment is the body of a message as it is.
Every page is checked: it must hold each position that was asked for, for all of them are known to be committed.

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
from user_service.reads import Page
from user_service.selection import Selection
from user_service.window import Window

log = logs.get(__name__)

# Where pages of older events are cut.
PAGE = 1000
# A scan for selected events in the window looks at this many at least, however few fit into a message.
_LEAST_SCAN = 100
# Pages that are kept: streams follow each other, and what one reads ahead it wants next.
_PAGES = 16
# What a kept message costs besides its bytes, roughly.
_OVERHEAD = 500


class BrokenLogError(Exception):
    """The log lacks a position that is committed and retained. Nothing may be sent past it."""


class Message(NamedTuple):
    """A finished message: `data` is its elements, `body` bytes, and a tail that goes from `previous_position` to
    `position`, with its token ("" inside an atomic group). `scanned` is where the next one begins. It has so many
    `events`; `newest` is when the last was committed, in seconds since 1970, and 0 if that is long ago.

    Without `data` nothing was selected; `position` then is where the token stands, if there is one.
    """

    data: bytes
    body: int
    previous_position: int
    position: int
    token: str
    scanned: int
    events: int
    newest: float

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
        self._pages: OrderedDict[tuple[int, int], asyncio.Task[Page]] = OrderedDict()
        self.broken = False

    async def after(self, position: int, selection: Selection, max_batch: int, include_previous: bool) -> Message:
        """The message that follows a position below the window's head.

        Raises POSITION_EXPIRED, DATABASE_UNAVAILABLE, or BrokenLogError.
        """
        live = self._window.covers(position)
        if live:
            size = min(max(max_batch, _LEAST_SCAN), PAGE) if selection.digest else max_batch
            upto = min(self._window.head, position + size)
        else:
            size = PAGE if selection.digest else max_batch
            upto = self._page_end(position, size)
        # What follows a position far behind does not grow any more, wherever its page ends.
        key = _Key(position, upto if live else 0, max_batch, include_previous, selection.digest)
        message = self._cache.get(key)
        if message is not None:
            self._cache.move_to_end(key)
            return message
        if live:
            message = next(self._build(key, selection, self._window.after(position, upto - position)))
            self._keep(key, message)
            return message
        page = await asyncio.shield(self._page(position, upto))
        if not self._window.covers(page.position):
            # Is read while this one is sent.
            self._page(page.position, self._page_end(page.position, size))
        # Another stream may have built it after the same read.
        message = self._cache.get(key)
        if message is None:
            built = self._as_it_is(key, page) or list(self._build(key, selection, page.entries()))
            after = position
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

    def _page_end(self, position: int, size: int) -> int:
        """Where the page after a position ends if it is not sealed."""
        return min(self._window.head, position // PAGE * PAGE + PAGE, position + size)

    def _page(self, after: int, upto: int) -> asyncio.Task[Page]:
        """A page, being read or at hand: streams that want the same one share one read, which goes on if the one that
        began it is cancelled.
        """
        key = (after, upto)
        page = self._pages.get(key)
        if page is None:
            page = self._pages[key] = asyncio.create_task(self._read(after, upto))
            page.add_done_callback(lambda done: self._forget_failure(key, done))
            if len(self._pages) > _PAGES:
                self._pages.popitem(last=False)
        return page

    def _forget_failure(self, key: tuple[int, int], page: asyncio.Task[Page]) -> None:
        # Asking for the exception is what tells asyncio that somebody knows of it.
        if (page.cancelled() or page.exception()) and self._pages.get(key) is page:
            del self._pages[key]

    async def _read(self, after: int, upto: int) -> Page:
        async with self.reader() as connection:
            page = await reads.page(connection, after, upto) or await reads.page(connection, after, upto)
            if page is None:
                state = await reads.feed_state(connection)
                if after + 1 < state.earliest:
                    raise errors.position_expired(after, state.earliest)
                self.broken = True
                log.error("the log has a hole", after=after, upto=upto)
                raise BrokenLogError(f"positions ({after}, {upto}] are not all there")
        return page

    def _as_it_is(self, key: _Key, page: Page) -> list[Message]:
        """A page as one message, if nothing of it need be left out, added, or sent apart; else nothing."""
        if key.selection or key.include_previous or page.position - page.after > key.max_batch:
            return []
        if len(page.elements) > events.LARGEST_MESSAGE:
            return []
        token = self._token(page.position, page.event_id, tokens.EVERYTHING) if page.group_end else ""
        data = page.elements + events.tail(token, page.after, page.position)
        count = page.position - page.after
        return [Message(data, len(page.elements), page.after, page.position, token, page.position, count, 0.0)]

    def _build(self, key: _Key, selection: Selection, entries: list[Entry]) -> Iterator[Message]:
        """Cuts the entries after `key.after` into messages, one at least; the last has scanned them all."""
        chosen, upto = selection.select(entries), entries[-1].position
        previous, scanned = key.after, key.after
        while chosen or scanned < upto:
            count = events.cut(chosen[: key.max_batch], key.include_previous)
            part, chosen = chosen[:count], chosen[count:]
            first = part[-1].position if part else scanned + 1
            scanned = chosen[0].position - 1 if chosen else upto
            rest = _resting_place(entries[first - key.after - 1 : scanned - key.after])
            token = self._token(rest.position, rest.event_id, selection.short) if rest.group_end else ""
            data, body = b"", 0
            if part:
                elements = events.join(part, key.include_previous)
                tail = events.tail(token, previous, rest.position)
                data = b"".join([*elements, tail])
                body = len(data) - len(tail)
            newest = part[-1].commit_time.timestamp() if part else 0.0
            yield Message(data, body, previous, rest.position, token, scanned, len(part), newest)
            previous = rest.position

    def _token(self, position: int, event_id: bytes, selection: bytes) -> str:
        seen = tokens.event_hash(event_id)
        return tokens.encode(tokens.ResumeToken(self._log_id, position, seen, selection))

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
