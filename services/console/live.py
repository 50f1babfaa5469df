"""What every open page is kept up with, and each page's own place in it.

A page is a `Browser`. It has no queue: it holds the position of the newest event it was told and is told what the ring
holds after it. So a slow page costs nothing, delays nobody, and skips what has left the ring meanwhile; it is told how
many. Status is whatever is true when the page takes the next message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from console import views
from servicekit.tasks import wake
from tidings.client import UserEvent

# Seconds: between two messages to a page at least, and at most.
_PACE, _BEAT = 0.2, 3.0
# Events in one message at most; of a burst the newest are shown.
_MOST_EVENTS = 200


@dataclass(slots=True)
class Changes:
    """How often lists changed that pages ask for themselves: a higher number is the cue to ask again."""

    deliveries: int = 0
    spans: int = 0


@dataclass(slots=True)
class Live:
    """The ring of the newest events, and the pages. `status` makes what is told besides."""

    events_kept: int
    max_browsers: int
    status: Callable[[], dict[str, Any]]
    changes: Changes = field(default_factory=Changes)
    closed: bool = False
    # Another one after the feed began anew: positions before it mean nothing.
    generation: int = 0
    _ring: deque[UserEvent] = field(init=False)
    _browsers: set[Browser] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ring = deque(maxlen=self.events_kept)

    def add(self, events: Sequence[UserEvent]) -> None:
        """Events that follow those of the ring."""
        self._ring.extend(events[-self.events_kept :])
        self.touch()

    def begin_anew(self) -> None:
        """Forgets the ring."""
        self._ring.clear()
        self.generation += 1
        self.touch()

    def touch(self) -> None:
        """There is something to tell."""
        for browser in self._browsers:
            browser.wake()

    def close(self) -> None:
        """Ends every page's stream."""
        self.closed = True
        self.touch()

    def event(self, position: int) -> UserEvent | None:
        """An event of the ring."""
        if not self._ring or not self._ring[0].position <= position <= self._ring[-1].position:
            return None
        found = self._ring[position - self._ring[0].position]
        return found if found.position == position else None

    def after(self, position: int) -> list[UserEvent]:
        """The events of the ring after a position, oldest first."""
        return [*takewhile(lambda event: event.position > position, reversed(self._ring))][::-1]

    @contextmanager
    def browser(self) -> Iterator[Browser | None]:
        """A page, while it is open; None if there are too many."""
        if self.closed or len(self._browsers) >= self.max_browsers:
            yield None
            return
        opened = Browser(self)
        self._browsers.add(opened)
        try:
            yield opened
        finally:
            self._browsers.discard(opened)


class Browser:
    """One open page."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._waiter: asyncio.Future[None] | None = None
        self._told = 0
        self._generation: int | None = None

    def wake(self) -> None:
        """Lets it look."""
        if self._waiter is not None:
            wake(self._waiter)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Message after message until the console stops; the first has all that is there. The reader sets the pace."""
        while not self._live.closed:
            yield self._message()
            await asyncio.sleep(_PACE)
            await self._wait(_BEAT - _PACE)

    def _message(self) -> dict[str, Any]:
        live = self._live
        reset = live.generation != self._generation
        if reset:
            self._generation, self._told = live.generation, 0
        events = live.after(self._told)
        # The first message of a page leaves nothing out that it could have been told.
        shown = events if reset else events[-_MOST_EVENTS:]
        skipped = shown[0].position - self._told - 1 if shown and not reset else 0
        if events:
            self._told = events[-1].position
        return {
            "reset": reset,
            "events": [views.event_row(event) for event in shown],
            "skipped": skipped,
            "changes": {"deliveries": live.changes.deliveries, "spans": live.changes.spans},
            "status": live.status(),
        }

    async def _wait(self, timeout: float) -> None:
        """Until there is something to tell, or the page should hear that all is well."""
        live = self._live
        if live.closed or live.generation != self._generation or (live._ring and live._ring[-1].position > self._told):
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([self._waiter], timeout=timeout)
        finally:
            self._waiter = None
