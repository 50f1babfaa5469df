"""The newest events in memory, and who waits for more of them.

The window always holds a contiguous run of committed events that ends at `head`, bounded in bytes. There is no queue
per subscriber: a stream keeps a position and takes what follows it from here (`after`), or learns that it has fallen
out of the window (`covers`). At the head it waits for its turn to take what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from user_service.events import Entry
from user_service.waiters import Waiters


class Window:
    """A contiguous run of the newest events. Use from one event loop."""

    def __init__(self, limit_bytes: int, callers_wait: Callable[[], bool] = lambda: False) -> None:
        self._limit = limit_bytes
        self._entries: list[Entry] = []
        self._bytes = 0
        self._waiters = Waiters(callers_wait)
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
        self._waiters.tell()

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

    def wake_all(self) -> None:
        """Wakes every waiting stream, for it has something else to learn than events."""
        self._waiters.tell()

    async def wait(self, until: float) -> None:
        """Returns when there are new events and it is the caller's turn, or at a time of the loop's clock."""
        await self._waiters.wait(until)
