"""Turns for work that can wait: one piece in each turn of the event loop, and less while callers wait for a commit.

Streams that open or read old events always have more to do. A thousand of them would fill the event loop's queue with
their next messages, and a caller's every step would wait behind them all. With turns it waits behind one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# Seconds between turns while callers wait. A piece takes a fifth of that: 500 messages a second are still sent.
_PAUSE = 0.002


class Turns:
    """First come, first served, while `callers_wait` says that nothing is more urgent. Use from one event loop."""

    def __init__(self, callers_wait: Callable[[], bool]) -> None:
        self._callers_wait = callers_wait
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_due = False

    async def mine(self) -> None:
        """Returns when it is the caller's turn."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if not self._is_due:
            self._schedule()
        await turn

    def _schedule(self) -> None:
        self._is_due = True
        loop = asyncio.get_running_loop()
        if self._callers_wait():
            loop.call_later(_PAUSE, self._next)
        else:
            loop.call_soon(self._next)

    def _next(self) -> None:
        self._is_due = False
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its stream was cancelled meanwhile
                turn.set_result(None)
                break
        if self._waiting:
            self._schedule()
