"""One stream of WatchUsers: where it begins, what it sends next, how it ends.

A stream is a position. Near the head it takes what follows from the window; further back from pages of Postgres. It is
never cut off for being slow: each message is awaited before the next is made, so it holds one message in memory and
delays nobody.

Every message says what it has passed (`previous_position`, `position`) and carries a token, except inside an atomic
group. The stream starts with a bookmark, offers a token at least every bookmark interval, and ends, at a shutdown or
when it has become old, with a bookmark and a drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import psycopg

from servicekit.database import Connection, Pool
from servicekit.streams import Life
from tidings.users.v1 import users_pb2
from user_service import errors, events, reads, tokens
from user_service.messages import BrokenLogError, Messages
from user_service.reads import FeedState
from user_service.window import Window

_Response = users_pb2.WatchUsersResponse

_FUTURE_TOKEN_WAIT = 5.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a stream asks for, checked. `start` is a decoded token, or where to begin without one: a time is that of
    the first event, or of what comes before it. Times are in seconds.
    """

    start: tokens.ResumeToken | datetime | Literal["earliest", "now"]
    include_previous: bool
    bookmark_interval: float
    max_batch: int
    linger: float


@dataclass(frozen=True, slots=True)
class _Start:
    position: int
    token: str
    # The primary's head at that time, as far as it was asked: a stream is not told before that it has caught up.
    head: int


class Streams:
    """All streams of this process: what they share, and their common end."""

    def __init__(
        self,
        pool: Pool,
        window: Window,
        messages: Messages,
        state: FeedState,
        *,
        max_streams: int,
        max_stream_age: float,
        reconnect_spread: float,
    ) -> None:
        self._pool = pool
        self._window = window
        self._messages = messages
        self._log_id = state.log_id
        self._life = Life(
            limit=max_streams, max_age=max_stream_age, reconnect_spread=reconnect_spread, wake=window.wake_all
        )

    async def drain(self, timeout: float) -> None:
        """Ends every stream with a bookmark and a drain; returns when they have ended, or after `timeout` seconds."""
        await self._life.drain(timeout)

    async def stream(self, request: Request) -> AsyncIterator[bytes]:
        """The messages of one stream, encoded. Ends by itself only with a drain."""
        with self._life.one() as old:
            start = await self._start(request)
            async for message in self._messages_from(start, request, old):
                yield message

    async def _messages_from(self, start: _Start, request: Request, old: float) -> AsyncIterator[bytes]:
        loop, window = asyncio.get_running_loop(), self._window
        position, token, live = start.position, start.token, False

        yield self._bookmark(position, token)
        bookmark_due = loop.time() + request.bookmark_interval
        inside_group = False
        while True:
            if not inside_group and self._life.is_over(old):
                yield self._bookmark(position, token)
                yield self._drain(position, token)
                return
            if position < window.head:
                if live and not window.covers(position):
                    live = False
                    yield self._fell_behind(position, "" if inside_group else token)
                if live and request.linger:
                    await self._linger(position, request, old)
                message = await self._messages.after(position, request.max_batch, request.include_previous)
                yield message.data
                position = message.position
                inside_group = not message.token
                if not inside_group:
                    token = message.token
                    bookmark_due = loop.time() + request.bookmark_interval
            elif not live and position >= start.head:
                live = True
                yield events.tail(token, position, position, caught_up=_Response.CaughtUp(position=position))
            elif loop.time() >= bookmark_due:
                yield self._bookmark(position, token)
                bookmark_due = loop.time() + request.bookmark_interval
            else:
                await window.wait(min(bookmark_due, old))

    async def _linger(self, position: int, request: Request, old: float) -> None:
        """Waits for more events than there are, for a message costs about the same however few it carries."""
        loop, window = asyncio.get_running_loop(), self._window
        until = loop.time() + request.linger
        while window.head - position < request.max_batch and loop.time() < until and not self._life.is_over(old):
            await window.wait(until)

    # Where a stream begins

    async def _start(self, request: Request) -> _Start:
        try:
            if isinstance(request.start, tokens.ResumeToken):
                return await self._resume(request.start)
            async with self._pool.connection() as connection:
                state = await reads.feed_state(connection)
                position = await _position(connection, request.start, state)
                event_id = await reads.event_id(connection, position) if position else None
            return _Start(position, self._messages.token(position, event_id), state.head)
        except psycopg.OperationalError as error:
            raise errors.database_unavailable() from error

    async def _resume(self, token: tokens.ResumeToken) -> _Start:
        if token.log_id != self._log_id:
            raise errors.foreign_token()
        if token.selection != tokens.EVERYTHING:
            raise errors.token_mismatch("resume_token")
        if token.position > self._window.head:
            await self._wait_for(token.position)
        if token.event_hash != await self._event_hash(token.position):
            raise errors.diverged_token(token.position)
        return _Start(token.position, tokens.encode(token), await self._head(token.position))

    async def _head(self, otherwise: int) -> int:
        """The primary's head. A stream that this replica can serve from memory needs no database."""
        try:
            async with self._pool.connection() as connection:
                return (await reads.feed_state(connection)).head
        except psycopg.OperationalError:
            return otherwise

    async def _wait_for(self, position: int) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _FUTURE_TOKEN_WAIT
        while self._window.head < position and loop.time() < until and not self._life.draining:
            await self._window.wait(until)
        if self._window.head >= position:
            return
        async with self._pool.connection() as connection:
            state = await reads.feed_state(connection)
        if state.head < position:
            raise errors.future_token(position, state.head)
        raise errors.replica_behind(position, self._window.head)

    async def _event_hash(self, position: int) -> bytes:
        if position == 0:
            return tokens.event_hash(None)
        entry = self._window.at(position)
        if entry is not None:
            return tokens.event_hash(entry.event_id)
        async with self._pool.connection() as connection:
            event_id = await reads.event_id(connection, position)
            if event_id is None:
                state = await reads.feed_state(connection)
                if position < state.earliest:
                    raise errors.position_expired(position, state.earliest)
                self._messages.broken = True
                raise BrokenLogError(f"position {position} is not there")
        return tokens.event_hash(event_id)

    # Messages without events

    def _bookmark(self, position: int, token: str) -> bytes:
        window = self._window
        mark = _Response.Bookmark(head_position=max(window.head, position))
        if window.head_time is not None:
            mark.head_time.FromDatetime(window.head_time)
        return events.tail(token, position, position, bookmark=mark)

    def _fell_behind(self, position: int, token: str) -> bytes:
        window = self._window
        mark = _Response.FellBehind(lag_events=window.head - position)
        next_entry = window.at(window.first)
        if next_entry is not None and window.head_time is not None:
            # The events in between are no longer in memory: the lag is at least this.
            mark.lag.FromTimedelta(window.head_time - next_entry.commit_time)
        return events.tail(token, position, position, fell_behind=mark)

    def _drain(self, position: int, token: str) -> bytes:
        reason, after = self._life.farewell()
        return events.tail(token, position, position, drain=_Response.Drain(reason=reason, reconnect_after=after))


async def _position(connection: Connection, start: datetime | Literal["earliest", "now"], state: FeedState) -> int:
    """The position after which a stream without a token begins."""
    if start == "now":
        return state.head
    if start == "earliest":
        return state.earliest - 1
    first = await reads.first_since(connection, start, state)
    if first == state.earliest and await _may_lack(connection, start, state):
        raise errors.time_expired(start, state.earliest)
    return first - 1


async def _may_lack(connection: Connection, start: datetime, state: FeedState) -> bool:
    """Whether events since a time may be among those that are no longer retained."""
    if state.earliest == 1:
        return False
    # The last event that was removed may have been committed together with the first that is left.
    edge = await reads.commit_time(connection, state.earliest) or state.head_time
    return start <= edge
