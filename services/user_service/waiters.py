"""Streams that wait for the next event, and when each of them is woken.

A gRPC message costs about the same however little it carries, so wake-ups are bounded to so many a second, whoever
waits: an allowance grows with time, and each wake-up takes from it. Who has waited longest is first. So after a quiet
time all are woken at once, and while events come faster than all can be told of each, every stream is told as often as
the others, a few at a time: none waits for a common moment, and the event loop is never full of their messages. It is
left to others for as long as those that were woken took it, for where processors are short a message takes many times
as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice, takewhile
from time import monotonic

from servicekit.tasks import wake

# Seconds of the allowance that a wake-up takes. To make and send a message takes about half of it.
_WAKE_SECONDS = 0.0001
# So many are woken in one turn of the event loop. While callers wait for a commit they get a moment before the next,
# in seconds.
_AT_ONCE = 32
_PAUSE = 0.001
# Seconds between turns that take what the allowance has grown by.
_STEP = 0.002


class Waiters:
    """Use from one event loop."""

    def __init__(self, callers_wait: Callable[[], bool]) -> None:
        self._callers_wait = callers_wait
        # What each waits for: more news than there were when it came. In the order in which they came.
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._news = 0
        self._allowance = 0.0
        self._counted = 0.0
        self._turn: asyncio.Handle | None = None

    async def wait(self, until: float) -> None:
        """Returns when it is the caller's turn to learn what has been told since, or at a time of the loop's clock."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting[waiter] = self._news
        timer = loop.call_at(until, wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiting.pop(waiter, None)

    def tell(self) -> None:
        """There is something new for all who wait."""
        self._news += 1
        if self._waiting and self._turn is None:
            self._wake_some()

    def _wake_some(self) -> None:
        loop, began = asyncio.get_running_loop(), monotonic()
        self._count(began)
        behind = takewhile(lambda waiter: self._waiting[waiter] < self._news, self._waiting)
        for waiter in list(islice(behind, min(_AT_ONCE, int(self._allowance)))):
            del self._waiting[waiter]
            wake(waiter)
            self._allowance -= 1
        # Comes after their next steps: each makes its message and hands it to gRPC.
        self._turn = loop.call_soon(self._rest, began)

    def _rest(self, began: float) -> None:
        self._turn = None
        if next(iter(self._waiting.values()), self._news) == self._news:
            return
        least = _STEP if self._allowance < 1 else _PAUSE if self._callers_wait() else 0.0
        self._turn = asyncio.get_running_loop().call_later(max(least, monotonic() - began), self._wake_some)

    def _count(self, now: float) -> None:
        """Adds to the allowance what the time since has brought; all who wait can be woken at once with the most."""
        most = max(_AT_ONCE, len(self._waiting))
        self._allowance = min(self._allowance + (now - self._counted) / _WAKE_SECONDS, most)
        self._counted = now
