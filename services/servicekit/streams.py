"""The life that all streams of a process share: each has an age, and all end together when the process drains."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from google.protobuf import duration_pb2

from servicekit.errors import ResourceExhaustedError, UnavailableError

_AGE_JITTER = 0.2
_RETRY_AFTER = 2.0, 10.0  # seconds, for those that are one too many: drawn, so that they do not come back together


class Life:
    """Of the streams of one kind. Times are in seconds.

    `max_age` bounds a stream's age, jittered, so that subscribers spread over replicas again by and by.
    `reconnect_spread` is what drained clients spread their reconnects over. `wake` wakes the streams that wait, so that
    they notice a drain. `limit` is how many streams may be open at once, `limit_per_caller` how many of one caller that
    has a name.
    """

    def __init__(
        self,
        *,
        limit: int,
        limit_per_caller: int,
        max_age: float,
        reconnect_spread: float,
        wake: Callable[[], None],
    ) -> None:
        self._limit = limit
        self._limit_per_caller = limit_per_caller
        self._max_age = max_age
        self._spread = reconnect_spread
        self._wake = wake
        self._running = 0
        self._running_of: Counter[str] = Counter()
        self._none_running = asyncio.Event()
        self._none_running.set()
        self.draining = False

    @contextmanager
    def one(self, caller: str) -> Iterator[float]:
        """Counts a stream for as long as it is open; yields when it is old, in the loop's time. Refused during a
        drain, and when there are as many as may be.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down", reason="SHUTTING_DOWN", retry_after=0.1)
        if self._running >= self._limit:
            raise _too_many(f"{self._running} streams are open, as many as this replica serves", limit=self._limit)
        if caller and self._running_of[caller] >= self._limit_per_caller:
            limit = self._limit_per_caller
            message = f"caller {caller} has {limit} streams open, as many as this replica serves to one caller"
            raise _too_many(message, limit=limit, caller=caller)
        self._running += 1
        self._running_of[caller] += 1
        self._none_running.clear()
        jitter = random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)  # noqa: S311 - no secret
        try:
            yield asyncio.get_running_loop().time() + self._max_age * jitter
        finally:
            self._running -= 1
            self._running_of[caller] -= 1
            if not self._running_of[caller]:
                del self._running_of[caller]
            if not self._running:
                self._none_running.set()

    def is_over(self, old: float) -> bool:
        """Whether a stream that is old at this time should end."""
        return self.draining or asyncio.get_running_loop().time() >= old

    def farewell(self) -> tuple[str, duration_pb2.Duration]:
        """Why a stream ends, and when its client should connect again."""
        after = duration_pb2.Duration()
        after.FromNanoseconds(int(random.uniform(0, self._spread) * 1e9))  # noqa: S311 - no secret
        reason = "the server is shutting down" if self.draining else "the stream has reached its greatest age"
        return reason, after

    async def drain(self, timeout: float) -> None:
        """Tells every stream to end; returns when they have, or after `timeout` seconds."""
        self.draining = True
        self._wake()
        try:
            async with asyncio.timeout(timeout):
                await self._none_running.wait()
        except TimeoutError:
            return


def _too_many(message: str, **metadata: object) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        message,
        reason="TOO_MANY_STREAMS",
        metadata={name: str(value) for name, value in metadata.items()},
        retry_after=random.uniform(*_RETRY_AFTER),  # noqa: S311 - no secret
    )
