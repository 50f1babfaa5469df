"""What every channel must do, whatever its protocol: a suite of checks over a small adapter.

`CHECKS` and `of_trouble` are run for every adapter by `test_channel_kit.py`. Each check opens a server that behaves, or
misbehaves, as the adapter can make it, and looks at what the channel says and what the server got.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from notification_service.channels import Channel, Message, Outcome
from notification_service.domain import Result
from tests.harness.bad import BadServer

# What an attempt is given where the server is silent, and elsewhere. Seconds.
_SHORT, _LONG = 0.3, 8.0
_HANGS = 20.0
_LONGEST_DETAIL = 500
_MANY = 40


class Kind(Enum):
    """How a server answers, as far as every protocol knows it."""

    REFUSED = auto()
    """For good."""
    NOT_NOW = auto()
    """For now: another attempt may be worth it."""
    WAIT = auto()
    """For now, and it says when to come back."""
    SILENT = auto()
    """It does not answer in time, or not all of it."""
    CUT = auto()
    """The connection ends before the answer, or in the middle of it."""
    ENDLESS = auto()
    """It says no and goes on talking for ever."""
    ODD = auto()
    """It has accepted and said so, and behaves oddly then."""


_RESULTS = {
    Kind.REFUSED: Result.REFUSED,
    Kind.NOT_NOW: Result.FAILED,
    Kind.WAIT: Result.FAILED,
    Kind.SILENT: Result.FAILED,
    Kind.CUT: Result.FAILED,
    Kind.ENDLESS: Result.FAILED,
    Kind.ODD: Result.SUCCEEDED,
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """How to try a channel.

    `serve` makes a server, not open yet, that keeps what it accepts with its key. `channel` makes the channel for it,
    whose attempts end by themselves after so many seconds, if it bounds them. `message` makes the message of a number
    for it. `tell` says what trouble comes next, and `calm` that none does; `troubles` are those that the server knows,
    by their kind, `greetings` such of them as only who connects anew meets. `lost` are those with which the server
    accepts and the channel cannot know it.
    """

    name: str
    serve: Callable[[], BadServer]
    channel: Callable[[Any, float], Channel]
    message: Callable[[Any, int], Message]
    tell: Callable[[Any, Any], None]
    calm: Callable[[Any], None]
    troubles: Mapping[Kind, Sequence[Any]]
    lost: Sequence[Any]
    greetings: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class _Tried:
    adapter: Adapter
    server: BadServer
    channel: Channel
    bound: float

    def message(self, number: int = 0) -> Message:
        return self.adapter.message(self.server, number)

    async def attempt(self, number: int = 0) -> Outcome:
        """As the dispatcher makes one: bounded, whether or not the channel bounds it."""
        try:
            async with asyncio.timeout(self.bound + 0.1):
                made = await self.channel.send(self.message(number))
        except TimeoutError:
            return Outcome(Result.FAILED, outage=True)
        assert len(made.detail) <= _LONGEST_DETAIL
        assert made.detail.isprintable()
        assert made.retry_after is None or made.retry_after >= 0
        return made

    async def succeeds(self, number: int) -> None:
        """An attempt is as good as any. Where attempts are short, a machine that is busy may cost some."""
        while (await self.attempt(number)).result is not Result.SUCCEEDED:
            assert self.bound < _LONG
        assert self.message(number).idempotency_key in {one.key for one in self.server.accepted}


@asynccontextmanager
async def _trying(adapter: Adapter, bound: float = _LONG) -> AsyncIterator[_Tried]:
    """A server, and a channel that is closed at the end and leaves nothing behind."""
    before = asyncio.all_tasks()
    async with asyncio.timeout(_HANGS), adapter.serve() as server:
        channel = adapter.channel(server, bound)
        yield _Tried(adapter, server, channel, bound)
        await channel.close()
        await _nothing_left(server, before)


async def _nothing_left(server: BadServer, before: set[asyncio.Task[Any]]) -> None:
    """Returns when no connection is open and no task runs that did not before."""
    while server.open or asyncio.all_tasks() - before:
        await asyncio.sleep(0.005)


# What a server answers


async def says_what_the_server_said(adapter: Adapter, kind: Kind, trouble: Any) -> None:
    """The outcome is of its kind, and the next attempt is as good as any."""
    async with _trying(adapter, _SHORT if kind is Kind.SILENT else _LONG) as tried:
        adapter.tell(tried.server, trouble)
        made = await tried.attempt()
        assert made.result is _RESULTS[kind], made
        assert made.outage or kind not in (Kind.SILENT, Kind.CUT), made
        assert (made.retry_after is not None) == (kind is Kind.WAIT), made
        await tried.succeeds(1)


async def goes_on_with_a_connection_that_is_kept(adapter: Adapter, kind: Kind, trouble: Any) -> None:
    """The same after something was sent. A channel may try a mere break of a kept connection again by itself."""
    async with _trying(adapter) as tried:
        await tried.succeeds(0)
        adapter.tell(tried.server, trouble)
        made = await tried.attempt(1)
        assert made.result in (_RESULTS[kind], Result.SUCCEEDED), made
        arrived = [one for one in tried.server.accepted if one.key == tried.message(1).idempotency_key]
        assert len(arrived) <= 1
        assert arrived or made.result is not Result.SUCCEEDED
        for number in (2, 3):
            await tried.succeeds(number)


async def repeats_itself(adapter: Adapter, trouble: Any) -> None:
    """What the server has accepted without saying so comes again with the same key and the same bytes."""
    async with _trying(adapter, _SHORT) as tried:
        adapter.tell(tried.server, trouble)
        assert (await tried.attempt()).result is Result.FAILED
        await tried.succeeds(0)
        first, *others = tried.server.accepted
        assert others
        for other in others:
            assert (first.key, first.target, first.content) == (other.key, other.target, other.content)


# Whatever the server answers


async def serves_many_at_once(adapter: Adapter) -> None:
    """Each message arrives once, with its own key."""
    async with _trying(adapter) as tried:
        made = await asyncio.gather(*(tried.channel.send(tried.message(number)) for number in range(_MANY)))
        assert {one.result for one in made} == {Result.SUCCEEDED}
        wanted = [tried.message(number).idempotency_key for number in range(_MANY)]
        assert sorted(one.key for one in tried.server.accepted) == sorted(wanted)


async def can_be_cancelled_anywhere(adapter: Adapter) -> None:
    """At every await of an attempt, a refused one, too: it ends, holds nothing, and the next is as good as any."""
    for trouble in (None, *adapter.troubles[Kind.REFUSED]):
        step = 1
        while await _cancelled_at(step, adapter, trouble):
            step += 1
        assert step > 1


async def _cancelled_at(step: int, adapter: Adapter, trouble: Any) -> bool:
    """Cancels when it waits for the `step`th time. Whether it did."""
    async with _trying(adapter) as tried:
        if trouble is not None:
            adapter.tell(tried.server, trouble)
        stepped = _Stepped(tried.channel.send(tried.message()), step)

        async def run() -> None:
            await stepped

        try:
            await asyncio.create_task(run())
        except asyncio.CancelledError:
            adapter.calm(tried.server)
            await tried.succeeds(1)
            return True
        assert stepped.taken < step, f"it has swallowed the cancellation at its await number {step}"
        return False


class _Stepped:
    """An attempt that is cancelled when it waits for the `step`th time."""

    def __init__(self, attempt: Coroutine[Any, Any, Outcome], step: int) -> None:
        self._attempt = attempt
        self._step = step
        self.taken = 0

    def __await__(self) -> Generator[Any, Any, None]:
        awaiting = self._attempt.__await__()
        try:
            future = next(awaiting)
            while True:
                self.taken += 1
                task = asyncio.current_task()
                if self.taken == self._step and task is not None:
                    task.cancel()
                try:
                    value = yield future
                except BaseException as error:
                    future = awaiting.throw(error)
                else:
                    future = awaiting.send(value)
        except StopIteration:
            return


# A channel's life


async def closes_twice(adapter: Adapter) -> None:
    """`close` may be called again, and ends also when the server says nothing any more."""
    async with _trying(adapter) as tried:
        await tried.succeeds(0)
        tried.server.mute()
        await tried.channel.close()
        await tried.channel.close()


async def outlives_its_server(adapter: Adapter) -> None:
    """A server that is away is an outage; when it is back, so is the channel, without anybody's doing."""
    before = asyncio.all_tasks()
    async with asyncio.timeout(_HANGS):
        server = adapter.serve()
        async with server:
            tried = _Tried(adapter, server, adapter.channel(server, _LONG), _LONG)
            await asyncio.gather(*(tried.succeeds(number) for number in range(4)))
        away = await tried.attempt(4)
        assert (away.result, away.outage) == (Result.FAILED, True)
        async with server:
            await tried.succeeds(4)
            await tried.channel.close()
            await _nothing_left(server, before)


Check = Callable[[Adapter], Awaitable[None]]
CheckOfTrouble = Callable[[Adapter, Kind, Any], Awaitable[None]]
CHECKS: tuple[Check, ...] = (serves_many_at_once, can_be_cancelled_anywhere, closes_twice, outlives_its_server)


def of_trouble(adapter: Adapter) -> Iterator[tuple[CheckOfTrouble, Kind, Any]]:
    """The checks of what a server answers, with each trouble that it knows."""
    for kind, troubles in adapter.troubles.items():
        for trouble in troubles:
            yield says_what_the_server_said, kind, trouble
            # Silence costs time, and what follows it is looked at already.
            if kind is not Kind.SILENT and trouble not in adapter.greetings:
                yield goes_on_with_a_connection_that_is_kept, kind, trouble
