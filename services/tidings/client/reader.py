"""Checks the messages of one connection and joins them to stretches: what all feeds share.

What always holds:
- A stretch ends where a token may stand: messages without a token are joined with those that follow.
- Each message begins where the one before it ended; anything else is a GapError.
- In a feed that leaves nothing out positions of events go up one by one, and every one of them is looked at. In one
  that selects they rise, between what a message says was passed before it and with it.
- The events of a snapshot stand at its one position, and nothing else stands between its beginning and its end.

A message of a thousand events costs little more than decoding it: the objects that stand for events are made once, for
the check and for the application, and positions are compared as lists. Only a message that fails is looked at one by
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import lt
from typing import Any, Generic, Literal, Protocol, TypeVar

import grpc.aio

from tidings.client.connection import End
from tidings.client.errors import GapError, ProtocolError
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

SnapshotPart = Literal["begin", "within", "end"]

_SNAPSHOT = users_pb2.UserEvent.SNAPSHOT


class _Positioned(Protocol):
    @property
    def position(self) -> int: ...


Message = TypeVar("Message", users_pb2.WatchUsersResponse, notifications_pb2.WatchNotificationsResponse)
Event = TypeVar("Event", bound=_Positioned)


@dataclass(frozen=True, slots=True)
class Stretch(Generic[Event]):
    """A part of a stream between two places where a token may stand; its subclasses say of which stream."""

    # In the order of their positions; empty at the beginning and end of a snapshot, and where a feed was asked to tell
    # its progress.
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
    # The part of a snapshot that this is; None outside of one.
    snapshot: SnapshotPart | None = None


Passed = TypeVar("Passed", bound=Stretch[Any])


@dataclass(frozen=True, slots=True)
class Source(Generic[Message, Event, Passed]):
    """What makes one kind of stream different from another."""

    name: str
    # Calls the method, to go on after a token. Without one, to begin where the feed starts or, if the second argument
    # says so, with a snapshot.
    call: Callable[[str | None, bool], grpc.aio.UnaryStreamCall[Any, Message]]
    events_of: Callable[[Message], Sequence[Event]]
    head_time_of: Callable[[Message], datetime | None]
    stretch: type[Passed]
    # Whether nothing is left out: positions of events go up one by one.
    dense: bool
    # What else a message says: further fields of its stretch.
    more_of: Callable[[Message], Mapping[str, Any]] = lambda _: {}


@dataclass(frozen=True, slots=True)
class Place:
    """How far a stream has been processed. `position`, and whether that is inside a snapshot, are None where the token
    came from elsewhere: a token does not tell.
    """

    token: str | None = None
    position: int | None = None
    inside_snapshot: bool | None = None


class Reader(Generic[Message, Event, Passed]):
    """Reads one connection, which must begin at a place."""

    def __init__(self, source: Source[Message, Event, Passed], place: Place) -> None:
        self._source: Source[Message, Event, Passed] = source
        self._begun = False
        self._position = place.position
        self._inside_snapshot = place.inside_snapshot
        self._stretch_from = 0
        self._events: tuple[Event, ...] = ()
        self._head = 0
        self._head_time: datetime | None = None
        self._live = False
        # Set once the server has said that it ends the stream.
        self.drained: End | None = None

    def take(self, message: Message) -> Passed | None:
        """What the message completes; None inside an atomic group."""
        if not self._begun:
            if not message.HasField("bookmark"):
                raise self._broken("the first message is no bookmark")
            self._begun, self._stretch_from = True, message.previous_position
        events, mark = tuple(self._source.events_of(message)), message.WhichOneof("mark")
        part = self._part_of_snapshot(events, mark, message.resume_token)
        self._check(message, events, part)
        self._position = message.position
        self._note(message, mark)
        self._events = self._events + events if self._events else events
        if not message.resume_token:
            return None
        passed: Passed = self._source.stretch(
            events=self._events,
            resume_token=message.resume_token,
            previous_position=self._stretch_from,
            position=message.position,
            head_position=max(self._head, message.position),
            head_time=self._head_time,
            caught_up=self._live,
            snapshot=part,
            **self._source.more_of(message),
        )
        self._stretch_from, self._events = message.position, ()
        return passed

    def place_after(self, passed: Passed) -> Place:
        """Where the stream is once the newest stretch has been processed."""
        return Place(passed.resume_token, passed.position, self._inside_snapshot)

    def _part_of_snapshot(self, events: tuple[Event, ...], mark: str | None, token: str) -> SnapshotPart | None:
        if mark == "snapshot_begin":
            part: SnapshotPart = "begin"
        elif mark == "snapshot_end":
            part = "end"
        elif _is_of_snapshot(events[0]) if events else self._inside_snapshot:
            part = "within"
        elif self._inside_snapshot:
            raise self._broken("a change before the end of a snapshot")
        else:
            # A stream that resumes in a snapshot starts with a bookmark, which does not tell.
            self._inside_snapshot = False if events or self._live else self._inside_snapshot
            return None
        if part != "begin" and self._inside_snapshot is False:
            raise self._broken("a part of a snapshot that has not begun")
        if part != "within" and events:
            raise self._broken("events beside the mark of a snapshot")
        if not token:
            raise self._broken("a part of a snapshot without a token")
        self._inside_snapshot = part != "end"
        return part

    def _check(self, message: Message, events: tuple[Event, ...], part: SnapshotPart | None) -> None:
        after: int = message.previous_position
        last: int
        if self._position is not None and after != self._position:
            raise GapError("the previous position of a message", self._position, after)
        positions: list[int] = [event.position for event in events]
        if part is not None:
            if positions.count(after) != len(positions) or not all(map(_is_of_snapshot, events)):
                raise self._broken("an event between the users of a snapshot, or one of them at another position")
            # What a snapshot makes needless may be passed with its beginning.
            last = max(after, message.position) if part == "begin" else after
        elif self._source.dense:
            last = after + len(events)
            if positions != [*range(after + 1, last + 1)]:
                raise _gap(after, events, dense=True)
        else:
            if not all(map(lt, (after, *positions), positions)):
                raise _gap(after, events, dense=False)
            last = positions[-1] if positions else after
            if message.position > last:
                return
        if message.position != last:
            raise GapError("the position of a message", last, message.position)

    def _note(self, message: Message, mark: str | None) -> None:
        match mark:
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

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self._source.name}: {what}")


def _is_of_snapshot(event: object) -> bool:
    return isinstance(event, users_pb2.UserEvent) and event.type == _SNAPSHOT


def _gap(after: int, events: Sequence[_Positioned], *, dense: bool) -> GapError:
    """The first event that does not follow the one before it."""
    for event in events:
        if event.position <= after or (dense and event.position != after + 1):
            break
        after = event.position
    return GapError("the position of an event", after + 1, event.position)
