"""Follows a stream over many connections: what all feeds share.

What always holds:
- A stretch ends where a token may stand: messages without a token are joined with those that follow.
- A token is remembered when the next stretch is asked for, that is after the last one was processed. A connection that
  breaks in between, or inside an atomic group, loses and repeats nothing: the next begins after that token.
- Each message begins where the one before it ended, across connections too; anything else is a GapError.
- What reconnecting can cure is cured, with exponential backoff and full jitter; what it cannot is raised.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

import grpc.aio

from tidings.client.connection import Connection, End
from tidings.client.cursor import CursorStore
from tidings.client.errors import GapError, ProtocolError
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

log = logging.getLogger("tidings.client")

_FIRST_BACKOFF = 0.25
_LONGEST_BACKOFF = 10.0

# Bookmark intervals without a message after which a connection is dead.
_SILENT_INTERVALS = 3


class _Positioned(Protocol):
    @property
    def position(self) -> int: ...


Message = TypeVar("Message", users_pb2.WatchUsersResponse, notifications_pb2.WatchNotificationsResponse)
Event = TypeVar("Event", bound=_Positioned)


@dataclass(frozen=True, slots=True)
class Stretch(Generic[Event]):
    """A part of a stream between two places where a token may stand; its subclasses say of which stream."""

    # In the order of their positions; empty only if the feed was asked to tell its progress.
    events: tuple[Event, ...]
    # Resumes after this stretch.
    resume_token: str
    # Where the stretch before ended, and where this one ends.
    previous_position: int
    position: int
    # The newest position of the log as last known, at least `position`, and its time.
    head_position: int
    head_time: datetime | None
    # Everything up to the head has been sent: the stream is live.
    caught_up: bool


Passed = TypeVar("Passed", bound=Stretch[Any])


@dataclass(frozen=True, slots=True)
class Source(Generic[Message, Event, Passed]):
    """What makes one kind of stream different from another."""

    name: str
    # Calls the method, to go on after a token or, without one, to begin where the feed starts.
    call: Callable[[str | None], grpc.aio.UnaryStreamCall[Any, Message]]
    events_of: Callable[[Message], Sequence[Event]]
    head_time_of: Callable[[Message], datetime | None]
    stretch: type[Passed]
    # Whether nothing is left out: positions of events go up one by one.
    dense: bool


class Follower(Generic[Message, Event, Passed]):
    """Remembers how far a stream has been processed."""

    def __init__(
        self,
        source: Source[Message, Event, Passed],
        *,
        cursor: CursorStore | None,
        bookmark_interval: float,
        progress: bool,
    ) -> None:
        self._source: Source[Message, Event, Passed] = source
        self._cursor = cursor
        self._interval = bookmark_interval
        self._progress = progress
        self._token: str | None = None
        self._position: int | None = None
        self._saved: str | None = None

    async def follow(self) -> AsyncGenerator[Passed, None]:
        """Stretch after stretch, without an end."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            await self._load()
            connection = Connection(self._source.call(self._token), _SILENT_INTERVALS * self._interval)
            opened = loop.time()
            reader = _Reader(self._source, self._position)
            try:
                while (end := reader.drained) is None:
                    message = await connection.read()
                    if isinstance(message, End):
                        end = message
                        break
                    passed = reader.take(message)
                    if passed is None:
                        continue
                    if passed.events:
                        failures = 0
                    if passed.events or self._progress:
                        yield passed
                    await self._remember(passed)
            finally:
                await connection.close()
            if loop.time() - opened >= self._interval:
                failures = 0
            jitter = random.uniform(0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**failures))  # noqa: S311 - no secret
            failures += 1
            delay = (end.wait or 0.0) + jitter
            level = logging.INFO if reader.drained else logging.WARNING
            log.log(level, "%s: %s; connecting again in %.1f s", self._source.name, end.reason, delay)
            await asyncio.sleep(delay)

    async def _load(self) -> None:
        stored = await self._cursor.load() if self._cursor else None
        if stored is None or stored == self._token:
            return
        # A token says nothing about its position: the first message will.
        self._token, self._position, self._saved = stored, None, stored

    async def _remember(self, passed: Passed) -> None:
        self._token, self._position = passed.resume_token, passed.position
        if self._cursor and self._token != self._saved:
            await self._cursor.save(self._token)
            self._saved = self._token


class _Reader(Generic[Message, Event, Passed]):
    """Checks and joins the messages of one connection. `position` is where it must begin, if that is known."""

    def __init__(self, source: Source[Message, Event, Passed], position: int | None) -> None:
        self._source: Source[Message, Event, Passed] = source
        self._begun = False
        self._position = position
        self._stretch_from = 0
        self._events: list[Event] = []
        self._head = 0
        self._head_time: datetime | None = None
        self._live = False
        # Set once the server has said that it ends the stream.
        self.drained: End | None = None

    def take(self, message: Message) -> Passed | None:
        """What the message completes; None inside an atomic group."""
        self._check(message)
        if not self._begun:
            self._begun, self._stretch_from = True, message.previous_position
        self._position = message.position
        self._events += self._source.events_of(message)
        self._note(message)
        if not message.resume_token:
            return None
        passed: Passed = self._source.stretch(
            events=tuple(self._events),
            resume_token=message.resume_token,
            previous_position=self._stretch_from,
            position=message.position,
            head_position=max(self._head, message.position),
            head_time=self._head_time,
            caught_up=self._live,
        )
        self._stretch_from = message.position
        self._events.clear()
        return passed

    def _check(self, message: Message) -> None:
        if not self._begun and not message.HasField("bookmark"):
            raise ProtocolError(f"{self._source.name}: the first message is no bookmark")
        if self._position is not None and message.previous_position != self._position:
            raise GapError("the previous position of a message", self._position, message.previous_position)
        position = message.previous_position
        for event in self._source.events_of(message):
            if event.position <= position or (self._source.dense and event.position != position + 1):
                raise GapError("the position of an event", position + 1, event.position)
            position = event.position
        if message.position < position or (self._source.dense and message.position != position):
            raise GapError("the position of a message", position, message.position)

    def _note(self, message: Message) -> None:
        match message.WhichOneof("mark"):
            case "bookmark":
                self._head = message.bookmark.head_position
                self._head_time = self._source.head_time_of(message)
            case "caught_up":
                self._live = True
            case "fell_behind":
                self._live = False
            case "drain":
                wait = message.drain.reconnect_after.ToNanoseconds() / 1e9
                self.drained = End(f"the server ends the stream: {message.drain.reason}", wait)
