"""Builds the messages that carry events, each once, and shares them among the streams that want the same.

Streams that are live at the same position and streams that catch up through the same pages ask for the same message; it
is kept under where it starts and ends. Older events come from Postgres in pages cut at fixed positions. Every page is
checked: it must hold each position that was asked for, for all of them are known to be committed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from dataclasses import dataclass

import psycopg

from servicekit import logs
from servicekit.database import Pool
from user_service import errors, events, reads, tokens
from user_service.events import Entry
from user_service.window import Window

log = logs.get(__name__)

# Where pages of older events are cut.
PAGE = 1000


class BrokenLogError(Exception):
    """The log lacks a position that is committed and retained. Nothing may be sent past it."""


@dataclass(frozen=True, slots=True)
class Message:
    """A finished message: its bytes, the position it passes, and its token ("" inside an atomic group)."""

    data: bytes
    position: int
    token: str


@dataclass(frozen=True, slots=True)
class _Key:
    after: int
    upto: int
    max_batch: int
    include_previous: bool


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
        self._reading: dict[_Key, asyncio.Task[Message]] = {}
        self.broken = False

    async def after(self, position: int, max_batch: int, include_previous: bool) -> Message:
        """The message that follows a position below the window's head.

        Raises POSITION_EXPIRED, DATABASE_UNAVAILABLE, or BrokenLogError.
        """
        live = self._window.covers(position)
        end = self._window.head if live else min(self._window.head, position // PAGE * PAGE + PAGE)
        key = _Key(position, min(end, position + max_batch), max_batch, include_previous)
        message = self._cache.get(key)
        if message is not None:
            self._cache.move_to_end(key)
            return message
        if live:
            return self._build(key, self._window.after(position, key.upto - position))
        # Streams that want the same page share one read, which goes on if the one that began it is cancelled.
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.create_task(self._read(key))
            self._reading[key] = reading
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        return await asyncio.shield(reading)

    def token(self, position: int, event_id: bytes | None) -> str:
        """The token of a position; the id of the event there is None at the start of the log."""
        return tokens.encode(tokens.ResumeToken(self._log_id, position, tokens.event_hash(event_id)))

    async def _read(self, key: _Key) -> Message:
        async with self._readers:
            try:
                async with self._pool.connection() as connection:
                    entries = await reads.events(connection, key.after, key.upto)
                    if not _is_whole(entries, key):
                        entries = await reads.events(connection, key.after, key.upto)
                    if not _is_whole(entries, key):
                        state = await reads.feed_state(connection)
                        if key.after + 1 < state.earliest:
                            raise errors.position_expired(key.after, state.earliest)
                        self.broken = True
                        log.error("the log has a hole", after=key.after, upto=key.upto, read=len(entries))
                        raise BrokenLogError(f"positions ({key.after}, {key.upto}] are not all there")
            except psycopg.OperationalError as error:
                raise errors.database_unavailable() from error
        return self._build(key, entries)

    def _build(self, key: _Key, entries: list[Entry]) -> Message:
        """Cuts entries into messages and keeps them all; returns the first."""
        first: Message | None = None
        after = key.after
        while entries:
            count = events.cut(entries, key.include_previous)
            part, entries = entries[:count], entries[count:]
            last = part[-1]
            token = self.token(last.position, last.event_id) if last.group_end else ""
            elements = events.join(part, key.include_previous)
            elements.append(events.tail(token, after, last.position))
            message = Message(b"".join(elements), last.position, token)
            self._keep(_Key(after, key.upto, key.max_batch, key.include_previous), message)
            first = first or message
            after = last.position
        assert first is not None  # noqa: S101 - a message is asked for only below the head
        return first

    def _keep(self, key: _Key, message: Message) -> None:
        if key in self._cache:
            return
        self._cache[key] = message
        self._cache_bytes += len(message.data)
        while self._cache_bytes > self._cache_limit and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= len(dropped.data)


def _is_whole(entries: list[Entry], key: _Key) -> bool:
    positions = range(key.after + 1, key.upto + 1)
    return len(entries) == len(positions) and all(
        entry.position == position for entry, position in zip(entries, positions, strict=True)
    )
