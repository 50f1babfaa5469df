"""What servers that misbehave share: a plan of their troubles, what they have received, and a gate to hold them at.

A plan follows from its seed: what number N meets is the same in every run. Each kind of trouble comes once before any
comes again. `tell` puts some first, for tests of one kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, Self, TypeVar

T = TypeVar("T")

# How fast a dripping server is: bytes per second.
_DRIP = 1.0
_CHUNK = 1 << 16


class Gone(Exception):  # noqa: N818 - nothing went wrong
    """This connection is over."""


@dataclass(eq=False, slots=True)
class Received:
    """A message that a server got in full.

    `at` is when, by `time.time()`; `peer` is the sender's port. `accepted` says that the server has taken it for its
    own, whatever it answered; `answer_time` is when all of a positive answer was written, 0 while it was not.
    """

    server: str
    key: str
    target: str
    content: bytes
    peer: int
    at: float
    accepted: bool = False
    answer_time: float = 0.0


class Plan(Generic[T]):
    """Which trouble comes next, if any: to so large a `share` of what is asked."""

    def __init__(self, troubles: Collection[T] = (), *, seed: str = "", share: float = 0.0) -> None:
        self._troubles = list(troubles)
        self._chance = random.Random(seed)
        self._round: deque[T] = deque()
        self._told: deque[T | None] = deque()
        self.share = share
        self.met: Counter[T] = Counter()

    def tell(self, *troubles: T | None) -> None:
        """These come first; None is no trouble."""
        self._told.extend(troubles)

    def calm(self) -> None:
        """No trouble from now on."""
        self.share = 0.0
        self._told.clear()

    def next(self) -> T | None:
        """What happens to what is asked now."""
        if self._told:
            return self._told.popleft()
        # Drawn in any case, so that what comes later does not depend on the share.
        draw = self._chance.random()
        if not self._troubles or draw >= self.share:
            return None
        if not self._round:
            self._round.extend(self._chance.sample(self._troubles, len(self._troubles)))
        return self._round.popleft()


class Moment(Enum):
    """Where a server can be held."""

    BEGUN = auto()
    """Somebody has begun to hand over a message."""
    RECEIVED = auto()
    """It has all of a message and has not accepted it."""
    ACCEPTED = auto()
    """It has accepted a message and has not answered."""


def _anybody(_: int) -> bool:
    return True


@dataclass(eq=False, slots=True)
class Hold:
    """A server that is held, once `happened` is set, until `release`."""

    moment: Moment
    wanted: Callable[[int], bool] = _anybody
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Lets the server go on."""
        self.released.set()


class Gate:
    """Where servers stop for who wants to do something just then. One gate may serve many servers."""

    def __init__(self) -> None:
        self._armed: list[Hold] = []

    @asynccontextmanager
    async def armed(self, moment: Moment, wanted: Callable[[int], bool] = _anybody) -> AsyncIterator[Hold]:
        """Holds the next message whose sender's port is wanted; it is let go at the end of the context."""
        hold = Hold(moment, wanted)
        self._armed.append(hold)
        try:
            yield hold
        finally:
            hold.release()
            with contextlib.suppress(ValueError):
                self._armed.remove(hold)

    async def passes(self, moment: Moment, peer: int) -> None:
        """Called by servers: waits if somebody wants it held."""
        for hold in self._armed:
            if hold.moment is moment and hold.wanted(peer):
                self._armed.remove(hold)
                hold.happened.set()
                await hold.released.wait()
                return


class BadServer:
    """A TCP server on a free port of 127.0.0.1, open while its context is. Subclasses serve one connection."""

    def __init__(self, name: str, gate: Gate | None = None) -> None:
        self.name = name
        self.gate = gate or Gate()
        # Everything that came in full, accepted or not, in the order in which it came.
        self.received: list[Received] = []
        self.port = 0
        # How many connections there were.
        self.connections = 0
        # The ports of those who are handing over a message just now.
        self.working: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._muted = False
        self._server: asyncio.Server | None = None

    @property
    def accepted(self) -> list[Received]:
        """What was accepted, in the order in which it came."""
        return [one for one in self.received if one.accepted]

    @property
    def open(self) -> int:
        """How many connections are open now."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=1 << 24)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._muted = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def mute(self) -> None:
        """Says nothing more on the connections that are open."""
        self._muted = True
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        peer = peer_of(writer)
        try:
            try:
                await self._serve(reader, writer)
            except asyncio.CancelledError:
                if self._muted:
                    await until_gone(reader)
        except (Gone, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.working.discard(peer)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    async def _keep(self, received: Received) -> None:
        """Accepts it: from here on it is this server's."""
        await self.gate.passes(Moment.RECEIVED, received.peer)
        received.accepted, received.at = True, time.time()

    def _note(self, key: str, target: str, content: bytes, writer: asyncio.StreamWriter) -> Received:
        received = Received(self.name, key, target, content, peer_of(writer), time.time())
        self.received.append(received)
        return received


def peer_of(writer: asyncio.StreamWriter) -> int:
    """The other side's port."""
    return int(writer.get_extra_info("peername")[1])


async def until_gone(reader: asyncio.StreamReader) -> None:
    """Says nothing until the other side goes away."""
    while await reader.read(_CHUNK):
        pass
    raise Gone


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    """Sends a byte a second."""
    for index in range(len(data)):
        writer.write(data[index : index + 1])
        await writer.drain()
        try:
            async with asyncio.timeout(1 / _DRIP):
                await until_gone(reader)
        except TimeoutError:
            continue


async def half(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Sends half of it and closes."""
    writer.write(data[: len(data) // 2])
    await writer.drain()
    raise Gone
