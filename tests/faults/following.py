"""A subscriber without any cure of its own: it writes down each message as it came, and resumes with the last token.

A session is what one subscriber receives over its streams, which may be on any replica. It ends a stream by itself at
random places, also inside atomic groups; a stream that says nothing for three bookmark intervals is given up.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tests.faults.asking import OPTIONS, reason_of
from tests.faults.journal import Journal
from tests.proof.records import Closed, Event, Message, Opened, Selection, digest, state
from tests.proof.streams import GOES_ON
from tidings.users.v1 import users_pb2

_METHOD = "/tidings.users.v1.UserService/WatchUsers"
_SILENCE = 3  # bookmark intervals
_LONGEST_REST = 3.0
# Without a bound nobody would come past a long group.
_MOST_CUTS = 3


@dataclass(frozen=True, slots=True)
class Habit:
    """How a subscriber reads. `replica` None: another one each time. `cut` and `cut_in_group` are the chances that it
    ends a stream after a message, `pause` the longest time it takes over one in seconds. With `turn` it begins a new
    session after that many messages past the first `caught_up`.
    """

    name: str
    start: str
    replica: int | None = None
    max_batch: int = 0
    interval: float = 1.0
    linger: float = 0.0
    include_previous: bool = False
    selection: Selection | None = None
    cut: float = 0.0
    cut_in_group: float = 0.0
    pause: float = 0.0
    turn: int | None = None


@dataclass(slots=True)
class Progress:
    """What all sessions of a process know. `finish` is the head to come to, once there is one."""

    finish: int | None = None
    giving_up: bool = False
    received: int = 0
    # Commit times that were seen, to begin at.
    times: list[int] = field(default_factory=list)
    calls: set[Any] = field(default_factory=set)

    def give_up(self) -> None:
        """Ends every session where it is."""
        self.giving_up = True
        for call in self.calls:
            call.cancel()


def channels(addresses: Sequence[str]) -> list[grpc.aio.Channel]:
    """A channel to each replica, for one subscriber."""
    return [grpc.aio.insecure_channel(address, options=OPTIONS) for address in addresses]


def watch(channel: grpc.aio.Channel, request: users_pb2.WatchUsersRequest) -> Any:
    """A stream of raw messages."""
    method: Any = channel.unary_stream(
        _METHOD, request_serializer=users_pb2.WatchUsersRequest.SerializeToString, response_deserializer=bytes
    )
    return method(request)


def request_of(habit: Habit, start: str, token: str, since_ns: int) -> users_pb2.WatchUsersRequest:
    """What a subscriber asks for."""
    interval = {"seconds": int(habit.interval), "nanos": round(habit.interval % 1 * 1e9)}
    request = users_pb2.WatchUsersRequest(
        include_previous=habit.include_previous,
        max_batch=habit.max_batch,
        bookmark_interval=interval,
        linger={"nanos": int(habit.linger * 1e9)},
    )
    if start in ("token", "forged"):
        request.resume_token = token
    elif start == "since":
        request.since.FromNanoseconds(since_ns)
    else:
        getattr(request, start).SetInParent()
    for name, value in (habit.selection or {}).items():
        if name == "shard":
            request.shard.index, request.shard.count = value
        elif name == "labels":
            request.filter.labels.update(value)
        elif name == "types":
            request.filter.types.extend(users_pb2.UserEvent.Type.Value(type_) for type_ in value)
        else:
            getattr(request.filter, name).extend(value)
    return request


def received(stream: str, data: bytes, at: float) -> Message:
    """A message as a record."""
    message = users_pb2.WatchUsersResponse.FromString(data)
    mark = message.WhichOneof("mark") or ""
    told = getattr(message, mark) if mark else None
    mark_position = getattr(told, "position", getattr(told, "head_position", 0))
    return Message(
        stream,
        at,
        len(data),
        message.previous_position,
        message.position,
        message.resume_token,
        mark,
        mark_position,
        [
            Event(
                event.position,
                event.id,
                users_pb2.UserEvent.Type.Name(event.type),
                state(event.user),
                event.commit_time.ToNanoseconds(),
                list(event.changed_fields),
                event.left_filter,
                digest(event.previous) if event.HasField("previous") else None,
            )
            for event in message.events
        ],
    )


class Subscriber:
    """Follows the feed by its habit, session after session, until `progress` says to finish."""

    def __init__(self, habit: Habit, addresses: Sequence[str], seed: int, journal: Journal, progress: Progress) -> None:
        self._habit = habit
        self._channels = channels(addresses)
        self._chance = random.Random(f"{seed} reader {habit.name}")
        self._journal = journal
        self._progress = progress
        self._sessions = 0
        self._streams = 0
        self._replica = self._chance.randrange(len(addresses))
        self._restart("")

    def _restart(self, start: str) -> None:
        """Begins a new session."""
        self._sessions += 1
        self._start = start or self._habit.start
        self._token = ""
        self._position = 0
        self._after_turn = 0
        self._is_caught_up = False
        self._cuts = 0
        self._begun = time.monotonic()

    async def run(self) -> None:
        """Reads stream after stream."""
        while True:
            name = f"{self._habit.name}/{self._sessions}/{self._streams}"
            closed = await self._stream(name)
            self._journal.note(closed)
            if closed.reason in ("finished", "unfinished") or self._progress.giving_up:
                break
            if closed.reason == "turn":
                # Whoever reads all of it again and again leaves room for the others.
                await asyncio.sleep(min(2 * (time.monotonic() - self._begun), _LONGEST_REST))
                self._restart("")
            elif closed.code and closed.code not in GOES_ON:
                # The token is refused; the validator will say whether rightly so.
                self._restart("" if self._habit.start == "snapshot" else "earliest")
            if closed.by == "server":
                await asyncio.sleep(0.05 + self._chance.random() * 0.2)
        for channel in self._channels:
            await channel.close()

    def _opened(self, name: str) -> Opened:
        habit = self._habit
        self._streams += 1
        if habit.replica is not None:
            self._replica = habit.replica
        else:
            self._replica = (self._replica + self._chance.randint(0, 1)) % len(self._channels)
        start = "token" if self._token else self._start
        since_ns = 0
        if start == "since":
            times = self._progress.times
            since_ns = self._chance.choice(times) + self._chance.choice([-1000, 0, 1000]) if times else 0
        return Opened(
            name, f"{habit.name}/{self._sessions}", self._replica, time.monotonic(), start, self._token,
            habit.interval, since_ns, habit.selection, habit.pause > 0,
        )  # fmt: skip

    async def _stream(self, name: str) -> Closed:
        opened = self._opened(name)
        self._journal.note(opened)
        request = request_of(self._habit, opened.start, opened.token, opened.since_ns)
        call = watch(self._channels[self._replica], request)
        silence = _Silence(call, self._habit.interval * _SILENCE + 1)
        self._progress.calls.add(call)
        try:
            while True:
                silence.expect()
                data = await call.read()
                silence.heard()
                if data is grpc.aio.EOF:
                    return Closed(name, time.monotonic(), "server", (await call.code()).name, "", 0)
                reason = await self._take(received(name, data, time.monotonic()))
                if reason:
                    return Closed(name, time.monotonic(), "reader", "", reason, 0)
        except grpc.aio.AioRpcError as error:
            reason, metadata = reason_of(error)
            earliest = int(metadata.get("earliest_position", 0))
            return Closed(name, time.monotonic(), "server", error.code().name, reason, earliest)
        except asyncio.CancelledError:
            if self._progress.giving_up:
                return Closed(name, time.monotonic(), "reader", "", "unfinished", 0)
            if silence.broken:
                return Closed(name, time.monotonic(), "reader", "", "silent", 0)
            raise
        finally:
            silence.heard()
            self._progress.calls.discard(call)
            call.cancel()

    async def _take(self, message: Message) -> str:
        """Writes a message down; says why the stream is to be ended, or ""."""
        habit, chance, progress = self._habit, self._chance, self._progress
        self._journal.note(message)
        progress.received += len(message.events)
        if message.events and chance.random() < 0.05:
            progress.times = [*progress.times[-200:], message.events[0].time_ns]
        self._position = message.position
        if message.token:
            self._token = message.token
        if message.token and message.events:
            self._cuts = 0
        self._is_caught_up |= message.mark == "caught_up"
        self._after_turn += self._is_caught_up
        if progress.giving_up:
            return "unfinished"
        if progress.finish is not None and self._position >= progress.finish and self._is_caught_up_or_live():
            return "finished"
        if habit.pause:
            await asyncio.sleep(chance.random() * habit.pause)
        if progress.finish is None and habit.turn is not None and self._after_turn > habit.turn:
            return "turn"
        inside = bool(message.events) and not message.token
        if chance.random() < (habit.cut_in_group if inside else habit.cut) and self._cuts < _MOST_CUTS:
            self._cuts += 1
            return "cut"
        return ""

    def _is_caught_up_or_live(self) -> bool:
        # A snapshot stands at its position from the first of its messages on.
        return self._start != "snapshot" or self._is_caught_up


class _Silence:
    """Ends a call that says nothing for too long. One timer, for a time-out around each read would cost a task."""

    def __init__(self, call: Any, patience: float) -> None:
        self._call = call
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self.broken = False

    def expect(self) -> None:
        """A message is waited for from here on."""
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._give_up)

    def heard(self) -> None:
        """It came, or is no longer waited for."""
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self) -> None:
        self.broken = True
        self._call.cancel()
