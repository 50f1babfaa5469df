"""How far streams are behind the feed, for who watches them.

Every second the event loop looks at each stream and at the window; what others read is the result. Of a stream that has
fallen out of the window the database is asked when the next event for it was committed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from servicekit.database import Pool
from user_service import metrics, reads
from user_service.track import Track
from user_service.window import Window

_LOOK = 1.0  # seconds


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    caller: str
    track: Track


class Lag:
    """The open streams of this process. `follow` is a background loop; `ask` is for one that is bounded in its cost."""

    def __init__(self, pool: Pool, window: Window) -> None:
        self._pool = pool
        self._window = window
        self._open: set[_Stream] = set()
        # By caller: what its slowest stream was sent, and when the event after that was committed, if there is one.
        self._slowest: dict[str, int] = {}
        self._since: dict[str, float | None] = {}
        # By caller: the commit time of what its slowest stream lacked when the database was asked.
        self._asked: dict[str, float] = {}
        self._earliest: int | None = None
        self._streams: Mapping[str, int] = {}
        self._read()

    def _read(self) -> None:
        window = self._window
        metrics.SUBSCRIBERS.read = lambda: [((caller,), count) for caller, count in list(self._streams.items())]
        metrics.LAG_EVENTS.read = lambda: [
            ((caller,), max(window.head - reached, 0)) for caller, reached in list(self._slowest.items())
        ]
        metrics.LAG_TIME.read = lambda: [
            ((caller,), 0.0 if since is None else max(time.time() - since, 0.0))
            for caller, since in list(self._since.items())
        ]
        metrics.EARLIEST.read_one(lambda: self._earliest)

    @contextmanager
    def of(self, caller: str, track: Track) -> Iterator[None]:
        """A stream, for as long as it is open."""
        stream = _Stream(caller, track)
        self._open.add(stream)
        try:
            yield
        finally:
            self._open.discard(stream)

    async def follow(self) -> None:
        """Looks at every stream, and again."""
        while True:
            self._look()
            await asyncio.sleep(_LOOK)

    def _look(self) -> None:
        streams: Counter[str] = Counter()
        slowest: dict[str, int] = {}
        for stream in self._open:
            caller, reached = stream.caller, max(stream.track.position, stream.track.sent)
            streams[caller] += 1
            slowest[caller] = min(slowest.get(caller, reached), reached)
        self._streams, self._slowest = streams, slowest
        self._since = {caller: self._lacking_since(caller, reached) for caller, reached in slowest.items()}

    def _lacking_since(self, caller: str, reached: int) -> float | None:
        window = self._window
        if reached >= window.head:
            return None
        if window.covers(reached):
            entry = window.at(reached + 1)
        elif caller in self._asked:
            return self._asked[caller]
        else:
            entry = window.at(window.first)  # it lacks this one, at least
        return None if entry is None else entry.commit_time.timestamp()

    async def ask(self) -> None:
        """Asks the database for what memory does not have."""
        lacking = {caller: reached + 1 for caller, reached in self._slowest.items() if not self._window.covers(reached)}
        async with self._pool.connection() as connection:
            self._earliest = (await reads.feed_state(connection)).earliest
            times = await reads.commit_times(connection, list(lacking.values())) if lacking else {}
        self._asked = {caller: times[position] for caller, position in lacking.items() if position in times}
