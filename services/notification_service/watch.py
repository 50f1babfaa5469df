"""Streams of WatchNotifications: where one begins, what it sends next, how it ends.

A stream is a position. Every message says what it has passed (`previous_position`, `position`) and carries a token.
It starts with a bookmark, offers a token at least every bookmark interval, and ends, at a shutdown or when it has
become old, with a drain. Each message is awaited before the next is made: a slow reader costs one message and delays
nobody.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

import psycopg

from notification_service import errors, tokens
from notification_service.store import reads
from notification_service.tail import Tail
from servicekit.database import Pool
from servicekit.streams import Life
from tidings.notifications.v1 import notifications_pb2

_Response = notifications_pb2.WatchNotificationsResponse

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Request:
    """What a stream asks for, checked. `start` is a position, or where to begin without one."""

    start: int | Literal["earliest", "now"]
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
        with self._life.one(caller) as old, self._tail.watching():
            try:
                position, head = await self._start(request)
                async for message in self._messages(request, position, head, old):
                    yield message
            except psycopg.OperationalError as error:
                raise errors.database_unavailable() from error

    async def _start(self, request: Request) -> tuple[int, int]:
        """Where the stream begins, and the head. Asks the database: other replicas' commits count at once."""
        async with self._pool.connection() as connection:
            head = await reads.head(connection)
        if request.start == "earliest":
            return 0, head
        if request.start == "now":
            return head, head
        if request.start > head:
            raise errors.future_token(request.start, head)
        return request.start, head

    async def _messages(self, request: Request, position: int, head: int, old: float) -> AsyncIterator[_Response]:
        loop, live = asyncio.get_running_loop(), False
        # What the last message has passed; a scan that finds nothing goes on without one.
        told = position
        yield _message(request, told, position, bookmark=_Response.Bookmark(head_position=head))
        bookmark_due = loop.time() + request.bookmark_interval
        while True:
            # What was there when the stream began is sent also before the tail has seen it.
            head = max(head, self._tail.head)
            if self._life.is_over(old):
                reason, after = self._life.farewell()
                yield _message(request, told, position, drain=_Response.Drain(reason=reason, reconnect_after=after))
                return
            if loop.time() >= bookmark_due:
                yield _message(request, told, position, bookmark=_Response.Bookmark(head_position=head))
            elif position < head:
                found, position = await self._next(request, position, head)
                if not found:
                    continue
                yield _message(request, told, position, notifications=found)
            elif not live:
                live = True
                yield _message(request, told, position, caught_up=_Response.CaughtUp(position=position))
            else:
                await self._tail.wait(max(0.0, min(bookmark_due, old) - loop.time()))
                continue
            told = position
            bookmark_due = loop.time() + request.bookmark_interval

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


def _message(
    request: Request,
    previous: int,
    position: int,
    *,
    notifications: Sequence[notifications_pb2.Notification] = (),
    bookmark: _Response.Bookmark | None = None,
    caught_up: _Response.CaughtUp | None = None,
    drain: _Response.Drain | None = None,
) -> _Response:
    return _Response(
        notifications=notifications,
        resume_token=tokens.encode("resume_token", position, request.selection),
        previous_position=previous,
        position=position,
        bookmark=bookmark,
        caught_up=caught_up,
        drain=drain,
    )
