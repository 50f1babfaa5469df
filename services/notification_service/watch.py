"""Streams of WatchNotifications: where one begins, what it sends next, how it ends.

A stream is a position. Every message says what it has passed (`previous_position`, `position`) and carries a token.
It starts with a bookmark, offers a token at least every bookmark interval, and ends, at a shutdown or when it has
become old, with a drain. Each message is awaited before the next is made: a slow reader costs one message and delays
nobody.

A stream of one user also tells that user's in-app counts: with its first message, and when it is live as soon as they
have become others. Counts come after the notifications that they are of.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import psycopg

from notification_service import errors, tokens
from notification_service.store import feed, in_app, reads
from notification_service.tail import Tail
from servicekit.database import Pool
from servicekit.streams import Life
from tidings.notifications.v1 import notifications_pb2

_Response = notifications_pb2.WatchNotificationsResponse

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Request:
    """What a stream asks for, checked. `start` is a token, or where to begin without one."""

    start: tokens.ResumeToken | Literal["earliest", "now"]
    user_id: uuid.UUID | None
    selection: bytes
    bookmark_interval: float


class Streams:
    """All streams of this process: what they share, and their common end."""

    def __init__(
        self,
        pool: Pool,
        tail: Tail,
        *,
        max_streams: int,
        max_streams_per_caller: int,
        max_stream_age: float,
        reconnect_spread: float,
    ) -> None:
        self._pool = pool
        self._tail = tail
        self._life = Life(
            limit=max_streams,
            limit_per_caller=max_streams_per_caller,
            max_age=max_stream_age,
            reconnect_spread=reconnect_spread,
            wake=tail.wake_all,
        )

    async def drain(self, timeout: float) -> None:
        """Ends every stream; returns when they have ended, or after `timeout` seconds."""
        await self._life.drain(timeout)

    async def stream(self, request: Request, caller: str) -> AsyncIterator[_Response]:
        """The messages of one stream. Ends by itself only with a drain."""
        with self._life.one(caller) as old, self._tail.watching(request.user_id):
            try:
                log_id, position, head = await self._start(request)
                made = partial(_message, partial(tokens.encode_resume, log_id, selection=request.selection))
                async for message in self._messages(request, made, position, head, old):
                    yield message
            except psycopg.OperationalError as error:
                raise errors.database_unavailable() from error

    async def _start(self, request: Request) -> tuple[uuid.UUID, int, int]:
        """The log, where the stream begins, and the head. Asks the database: other replicas' commits count at once."""
        async with self._pool.connection() as connection:
            found = await reads.log(connection)
            if found is None:
                await feed.read_cursor(connection)  # makes the row that has the log's identity
                found = await reads.log(connection)
        if found is None:
            raise LookupError("the inbox has no row")
        log_id, head = found
        if request.start == "earliest":
            return log_id, 0, head
        if request.start == "now":
            return log_id, head, head
        if request.start.log_id not in (None, log_id):
            raise errors.foreign_token()
        if request.start.position > head:
            raise errors.future_token(request.start.position, head)
        return log_id, request.start.position, head

    async def _messages(
        self, request: Request, made: Callable[..., _Response], position: int, head: int, old: float
    ) -> AsyncIterator[_Response]:
        loop, live = asyncio.get_running_loop(), False
        # What the last message has passed; a scan that finds nothing goes on without one.
        told = position
        counted = await self._count(request.user_id)
        # The newest notification of the user that was sent.
        newest = 0
        yield made(told, position, bookmark=_Response.Bookmark(head_position=head), counted=counted)
        bookmark_due = loop.time() + request.bookmark_interval
        while True:
            # What was there when the stream began is sent also before the tail has seen it.
            head = max(head, self._tail.head)
            if self._life.is_over(old):
                reason, after = self._life.farewell()
                yield made(told, position, drain=_Response.Drain(reason=reason, reconnect_after=after))
                return
            if loop.time() >= bookmark_due:
                yield made(told, position, bookmark=_Response.Bookmark(head_position=head))
            elif position < head:
                found, position = await self._next(request, position, head)
                if not found:
                    continue
                newest = found[-1].position
                yield made(told, position, notifications=found)
            elif not live:
                live = True
                yield made(told, position, caught_up=_Response.CaughtUp(position=position))
            elif counted is not None and self._is_stale(request.user_id, counted, newest):
                before, counted = counted, await self._count(request.user_id)
                if counted is None or _same(before, counted):
                    continue
                yield made(told, position, counted=counted)
            else:
                await self._tail.wait(max(0.0, min(bookmark_due, old) - loop.time()))
                continue
            told = position
            bookmark_due = loop.time() + request.bookmark_interval

    async def _count(self, user_id: uuid.UUID | None) -> in_app.Counted | None:
        """The counts of a user; None for a stream of all users."""
        if user_id is None:
            return None
        async with self._pool.connection() as connection:
            return await in_app.counts(connection, user_id)

    def _is_stale(self, user_id: uuid.UUID | None, counted: in_app.Counted, newest: int) -> bool:
        """Whether something was marked, or has arrived, since it was counted."""
        marked = user_id is not None and self._tail.version(user_id) > counted.version
        return marked or newest > counted.counts.position

    async def _next(
        self, request: Request, position: int, head: int
    ) -> tuple[list[notifications_pb2.Notification], int]:
        """The notifications that follow a position, and the position they reach to."""
        if self._tail.covers(position) and self._tail.head >= head:
            found = self._tail.after(position)
            if request.user_id is not None:
                wanted = str(request.user_id)
                found = [one for one in found if one.user_id == wanted]
        else:
            async with self._pool.connection() as connection:
                found = await reads.tail(connection, position, head, _PAGE, request.user_id)
        if len(found) >= _PAGE:
            found = found[:_PAGE]
            return found, found[-1].position
        return found, head


def _same(one: in_app.Counted, other: in_app.Counted) -> bool:
    """Whether the numbers are the same, whenever they were counted."""
    return (one.counts.total, one.counts.unseen, one.counts.unread) == (
        other.counts.total,
        other.counts.unseen,
        other.counts.unread,
    )


def _message(
    token: Callable[[int], str],
    previous: int,
    position: int,
    *,
    notifications: Sequence[notifications_pb2.Notification] = (),
    bookmark: _Response.Bookmark | None = None,
    caught_up: _Response.CaughtUp | None = None,
    drain: _Response.Drain | None = None,
    counted: in_app.Counted | None = None,
) -> _Response:
    return _Response(
        notifications=notifications,
        resume_token=token(position),
        previous_position=previous,
        position=position,
        bookmark=bookmark,
        caught_up=caught_up,
        drain=drain,
        in_app_counts=counted.counts if counted else None,
    )
