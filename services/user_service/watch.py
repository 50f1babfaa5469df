"""One stream of WatchUsers: where it begins, what it sends next, how it ends.

A stream is a position. Near the head it takes what follows from the window; further back from pages of Postgres. It is
never cut off for being slow: each message is awaited before the next is made, so it holds one message in memory and
delays nobody. A stream that begins with a snapshot sends its users first, all at one position.

Every message says what it has passed (`previous_position`, `position`) and carries a token, except inside an atomic
group. The stream starts with a bookmark, offers a token at least every bookmark interval, also while nothing is
selected of what it reads, and ends, at a shutdown or when it has become old, with a bookmark and a drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import psycopg

from servicekit import logs
from servicekit.database import Connection, Pool
from servicekit.errors import ServiceError
from servicekit.streams import Life
from tidings.users.v1 import users_pb2
from user_service import errors, metrics, reads, snapshot, tokens
from user_service.lag import Lag
from user_service.messages import BrokenLogError, Messages
from user_service.reads import FeedState
from user_service.track import Track
from user_service.turns import Turns
from user_service.watch_request import WatchRequest
from user_service.window import Window

log = logs.get(__name__)

_Response = users_pb2.WatchUsersResponse

_FUTURE_TOKEN_WAIT = 5.0
# Longer than the rest of a group takes to arrive, which wakes the stream.
_GROUP_WAIT = 1.0


@dataclass(frozen=True, slots=True)
class _Start:
    token: tokens.ResumeToken
    # The primary's head at that time, as far as it was asked: a stream is not told before that it has caught up.
    head: int


class Streams:
    """All streams of this process: what they share, and their common end."""

    def __init__(
        self,
        pool: Pool,
        window: Window,
        messages: Messages,
        turns: Turns,
        lag: Lag,
        state: FeedState,
        *,
        max_streams: int,
        max_streams_per_caller: int,
        max_stream_age: float,
        reconnect_spread: float,
    ) -> None:
        self._pool = pool
        self._window = window
        self._messages = messages
        self._log_id = state.log_id
        self._turns = turns
        self._lag = lag
        self._life = Life(
            limit=max_streams,
            limit_per_caller=max_streams_per_caller,
            max_age=max_stream_age,
            reconnect_spread=reconnect_spread,
            wake=window.wake_all,
        )

    async def drain(self, timeout: float) -> None:
        """Ends every stream with a bookmark and a drain; returns when they have ended, or after `timeout` seconds."""
        await self._life.drain(timeout)

    async def stream(self, request: WatchRequest, caller: str) -> AsyncIterator[bytes]:
        """The messages of one stream, encoded. Ends by itself only with a drain."""
        with self._life.one(caller) as old:
            await self._turns.mine()
            start = await self._start(request)
            token = start.token
            track = Track(request.bookmark_interval, token.position, tokens.encode(token), token.position)
            with self._lag.of(caller, track):
                yield self._bookmark(track)
                if token.snapshot is not None:
                    async for message in self._snapshot(token, token.snapshot, request, track, old):
                        yield message
                async for message in self._events(request, start.head, track, old):
                    yield message

    async def _snapshot(
        self, token: tokens.ResumeToken, inside: tokens.InSnapshot, request: WatchRequest, track: Track, old: float
    ) -> AsyncIterator[bytes]:
        """The users of a snapshot. Ends before they are all sent if the stream is over."""
        position = token.position
        if not inside.last:
            yield track.mark(snapshot_begin=_Response.SnapshotBegin(position=position))
        parts = snapshot.parts(self._messages.reader, request.selection, position, inside.last, request.max_batch)
        async with aclosing(parts):
            async for part in parts:
                track.token = tokens.encode(replace(token, snapshot=replace(inside, last=part.last)))
                if part.elements:
                    metrics.sent(len(part.elements))
                    yield b"".join((*part.elements, track.mark()))
                elif track.is_due:
                    yield self._bookmark(track)
                if self._life.is_over(old):
                    return
                await self._turns.mine()
        track.token = tokens.encode(replace(token, snapshot=None))
        yield track.mark(snapshot_end=_Response.SnapshotEnd(position=position))
        try:
            async with self._messages.reader() as connection:
                await snapshot.end(connection, inside.id)
        except ServiceError as error:
            log.warning("a snapshot is closed only when it expires", error=str(error))

    async def _events(self, request: WatchRequest, head: int, track: Track, old: float) -> AsyncIterator[bytes]:
        """What follows; `head` is that of the start."""
        loop, window = asyncio.get_running_loop(), self._window
        scanned, live = track.position, False
        while True:
            inside_group = track.inside_group
            if not inside_group and self._life.is_over(old):
                yield self._bookmark(track)
                yield self._drain(track)
                return
            if scanned < window.head:
                if live and not window.covers(scanned):
                    live = False
                    yield self._fell_behind(scanned, track)
                if live and request.linger:
                    await self._linger(scanned, request, track, old)
                if not live:
                    await self._turns.mine()
                message = await self._messages.after(
                    scanned, request.selection, request.max_batch, request.include_previous
                )
                scanned = message.scanned
                data = track.take(message)
                if data:
                    metrics.sent(message.events, message.newest if live else 0.0)
                    yield data
                elif (inside_group and not track.inside_group) or track.is_due:
                    yield self._bookmark(track)
                else:
                    await asyncio.sleep(0)
            elif inside_group:
                # The rest of it is committed and will be here at once.
                await window.wait(loop.time() + _GROUP_WAIT)
            elif not live and scanned >= head:
                live = True
                yield track.mark(caught_up=_Response.CaughtUp(position=track.position))
            elif track.is_due:
                yield self._bookmark(track)
            else:
                await window.wait(min(track.due, old))

    async def _linger(self, scanned: int, request: WatchRequest, track: Track, old: float) -> None:
        """Waits for more events than there are, for a message costs about the same however few it carries."""
        loop, window = asyncio.get_running_loop(), self._window
        until = min(loop.time() + request.linger, track.due)
        while window.head - scanned < request.max_batch and loop.time() < until and not self._life.is_over(old):
            await window.wait(until)

    # Where a stream begins

    async def _start(self, request: WatchRequest) -> _Start:
        try:
            if isinstance(request.start, tokens.ResumeToken):
                return await self._resume(request.start, request.selection.short)
            async with self._pool.connection() as connection:
                start: datetime | int | Literal["earliest", "now"]
                inside = None
                if request.start == "snapshot":
                    opened = await snapshot.begin(connection)
                    start, inside = opened.position, tokens.InSnapshot(opened.id)
                else:
                    start = request.start
                async with reads.one_view(connection):
                    state = await reads.feed_state(connection)
                    position = await _position(connection, start, state)
                    event_id = await reads.event_id(connection, position) if position else None
        except psycopg.OperationalError as error:
            raise errors.database_unavailable() from error
        seen = tokens.event_hash(event_id)
        return _Start(tokens.ResumeToken(self._log_id, position, seen, request.selection.short, inside), state.head)

    async def _resume(self, token: tokens.ResumeToken, selection: bytes) -> _Start:
        if token.log_id != self._log_id:
            raise errors.foreign_token()
        if token.selection != selection:
            raise errors.token_mismatch("resume_token")
        if token.position > self._window.head:
            await self._wait_for(token.position)
        state = await self._state()
        # What memory still has does not count: every replica gives the same answer.
        if state is not None and token.position + 1 < state.earliest:
            raise errors.position_expired(token.position, state.earliest)
        if token.event_hash != await self._event_hash(token.position):
            raise errors.diverged_token(token.position)
        return _Start(token, token.position if state is None else state.head)

    async def _state(self) -> FeedState | None:
        """The feed's row. A stream that this replica can serve from memory needs no database."""
        try:
            async with self._pool.connection() as connection:
                return await reads.feed_state(connection)
        except psycopg.OperationalError:
            return None

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

    def _bookmark(self, track: Track) -> bytes:
        window = self._window
        mark = _Response.Bookmark(head_position=max(window.head, track.position))
        if window.head_time is not None:
            mark.head_time.FromDatetime(window.head_time)
        return track.mark(bookmark=mark)

    def _fell_behind(self, scanned: int, track: Track) -> bytes:
        window = self._window
        mark = _Response.FellBehind(lag_events=window.head - scanned)
        next_entry = window.at(window.first)
        if next_entry is not None and window.head_time is not None:
            # The events in between are no longer in memory: the lag is at least this.
            mark.lag.FromTimedelta(window.head_time - next_entry.commit_time)
        return track.mark(fell_behind=mark)

    def _drain(self, track: Track) -> bytes:
        reason, after = self._life.farewell()
        return track.mark(drain=_Response.Drain(reason=reason, reconnect_after=after))


async def _position(
    connection: Connection, start: datetime | int | Literal["earliest", "now"], state: FeedState
) -> int:
    """The position after which a stream without a token begins; a number is that of its snapshot."""
    if isinstance(start, int):
        return start
    if start == "now":
        return state.head
    if start == "earliest":
        return state.earliest - 1
    if state.edge_time is not None and start <= state.edge_time:
        raise errors.time_expired(start, state.earliest)
    first = await reads.first_since(connection, start, state)
    return first - 1
