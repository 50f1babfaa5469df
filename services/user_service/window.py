"""The newest events in memory, and who waits for more of them.

The window always holds a contiguous run of committed events that ends at `head`, bounded in bytes. There is no queue
per subscriber: a stream keeps a position and takes what follows it from here (`after`), or learns that it has fallen
out of the window (`covers`). Waiting streams are woken together, and the more of them there are the less often, for a
gRPC message costs about the same however little it carries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime

from servicekit.tasks import wake
from user_service.events import Entry

# What sending one message to one stream takes, roughly: streams are not woken faster than they can be served.
_MESSAGE_SECONDS = 0.00015
_LONGEST_PACE = 0.25
# So many are woken in one turn of the event loop. While callers wait for a commit they get a moment before the next,
# in seconds.
_AT_ONCE = 32
_PAUSE = 0.001


class Window:
    """A contiguous run of the newest events. Use from one event loop."""

    def __init__(self, limit_bytes: int, callers_wait: Callable[[], bool] = lambda: False) -> None:
        self._limit = limit_bytes
        self._callers_wait = callers_wait
        self._entries: list[Entry] = []
        self._bytes = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._wake_timer: asyncio.TimerHandle | None = None
        self._last_wake = 0.0
        self.head = 0
        self.head_time: datetime | None = None

    def reset(self, head: int, head_time: datetime | None) -> None:
        """Empties the window; the next event is at `head` + 1."""
        self._entries.clear()
        self._bytes = 0
        self.head = head
        self.head_time = head_time

    @property
    def first(self) -> int:
        """The first position held; `head` + 1 if none is."""
        return self.head + 1 - len(self._entries)

    @property
    def bytes(self) -> int:
        """What the window holds, in bytes."""
        return self._bytes

    def covers(self, position: int) -> bool:
        """Whether everything after a position is here."""
        return position >= self.first - 1

    def append(self, entries: Sequence[Entry]) -> None:
        """Adds the events that follow `head`; those at or below it are left out. Raises ValueError on a gap."""
        entries = [entry for entry in entries if entry.position > self.head]
        for expected, entry in enumerate(entries, self.head + 1):
            if entry.position != expected:
                raise ValueError(f"position {entry.position} where {expected} follows")
        if not entries:
            return
        self._entries.extend(entries)
        self._bytes += sum(entry.size for entry in entries)
        self.head = entries[-1].position
        self.head_time = entries[-1].commit_time
        self._evict()
        self._wake()

    def _evict(self) -> None:
        if self._bytes <= self._limit:
            return
        # In strides, for cutting a list at its front moves the rest.
        target, dropped = self._limit * 9 // 10, 0
        while self._bytes > target:
            self._bytes -= self._entries[dropped].size
            dropped += 1
        del self._entries[:dropped]

    def after(self, position: int, limit: int) -> list[Entry]:
        """At most `limit` events after a position that the window covers."""
        start = position + 1 - self.first
        return self._entries[start : start + limit]

    def at(self, position: int) -> Entry | None:
        """The event at a position, if it is here."""
        index = position - self.first
        return self._entries[index] if 0 <= index < len(self._entries) else None

    def _wake(self) -> None:
        if not self._waiters or self._wake_timer is not None:
            return
        loop = asyncio.get_running_loop()
        pace = min(len(self._waiters) * _MESSAGE_SECONDS, _LONGEST_PACE) if len(self._waiters) > 1 else 0.0
        due = self._last_wake + pace
        if due <= loop.time():
            self._wake_now()
        else:
            self._wake_timer = loop.call_at(due, self._wake_now)

    def _wake_now(self) -> None:
        self._wake_timer = None
        self._last_wake = asyncio.get_running_loop().time()
        self.wake_all()

    def wake_all(self) -> None:
        """Wakes every waiting stream, for an event or because the server drains."""
        waiters, self._waiters = self._waiters, set()
        self._wake_some(list(waiters))

    def _wake_some(self, waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters[:_AT_ONCE]:
            wake(waiter)
        rest = waiters[_AT_ONCE:]
        if rest:
            pause = _PAUSE if self._callers_wait() else 0
            asyncio.get_running_loop().call_later(pause, self._wake_some, rest)

    async def wait(self, until: float) -> None:
        """Returns at the next wake-up, or at a time of the loop's clock."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.add(waiter)
        timer = loop.call_at(until, wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.discard(waiter)
