"""Follows a stream over many connections: what all feeds share.

What always holds:
- A place is remembered, and its token saved, when the next stretch is asked for, that is after the last one was
  processed. A connection that breaks in between, or inside an atomic group, loses and repeats nothing: the next begins
  after that token.
- What reconnecting can cure is cured, with exponential backoff and full jitter, and not before the server wants it;
  what it cannot is raised, or cured by a snapshot if the feed was asked to.
"""

from __future__ import annotations

import asyncio
import logging
import random
from asyncio import sleep
from collections.abc import AsyncGenerator
from typing import Generic

from tidings.client.connection import Connection, End
from tidings.client.cursor import CursorStore
from tidings.client.errors import FeedRefusedError, LostPlaceError
from tidings.client.reader import Event, Message, Passed, Place, Reader, Source

log = logging.getLogger("tidings.client")

_FIRST_BACKOFF = 0.25
_LONGEST_BACKOFF = 10.0

# Bookmark intervals without a message after which a connection is dead.
_SILENT_INTERVALS = 3

# Errors after which a feed begins anew with a snapshot.
LostPlace = type[LostPlaceError] | tuple[type[LostPlaceError], ...]


class Follower(Generic[Message, Event, Passed]):
    """Remembers how far a stream has been processed."""

    def __init__(
        self,
        source: Source[Message, Event, Passed],
        *,
        cursor: CursorStore | None,
        bookmark_interval: float,
        progress: bool,
        snapshot_on: LostPlace = (),
    ) -> None:
        self._source: Source[Message, Event, Passed] = source
        self._cursor = cursor
        self._interval = bookmark_interval
        self._progress = progress
        self._snapshot_on = snapshot_on
        self._place = Place()
        self._saved: str | None = None
        # Set by a fall back to a snapshot: where no token is left to go on after, and one that is not to be tried
        # again.
        self._anew = False
        self._refused: str | None = None

    async def follow(self) -> AsyncGenerator[Passed, None]:
        """Stretch after stretch, without an end."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            await self._load()
            call = self._source.call(self._place.token, self._anew)
            connection = Connection(call, _SILENT_INTERVALS * self._interval)
            opened = loop.time()
            reader = Reader(self._source, self._place)
            try:
                while (end := reader.drained) is None:
                    message = await connection.read()
                    if isinstance(message, End):
                        end = message
                        break
                    passed = reader.take(message)
                    if passed is None:
                        continue
                    if passed.events:
                        failures = 0
                    if passed.events or passed.snapshot in ("begin", "end") or self._progress:
                        yield passed
                    await self._remember(reader.place_after(passed))
            except FeedRefusedError as refusal:
                end = self._begin_anew(refusal)
            finally:
                await connection.close()
            if loop.time() - opened >= self._interval:
                failures = 0
            delay = _delay(failures, end.wait)
            failures += 1
            level = logging.INFO if reader.drained else logging.WARNING
            log.log(level, "%s: %s; connecting again in %.1f s", self._source.name, end.reason, delay)
            await sleep(delay)

    async def _load(self) -> None:
        stored = await self._cursor.load() if self._cursor else None
        if stored is not None and stored not in (self._place.token, self._refused):
            self._place, self._saved, self._refused = Place(stored), stored, None

    async def _remember(self, place: Place) -> None:
        self._place = place
        if self._cursor and place.token is not None and place.token != self._saved:
            await self._cursor.save(place.token)
            self._saved = place.token

    def _begin_anew(self, refusal: FeedRefusedError) -> End:
        token = self._place.token
        # A snapshot that is refused itself is not to be had.
        if not isinstance(refusal, self._snapshot_on) or (token is None and self._anew):
            raise refusal
        self._place, self._anew, self._refused = Place(), True, token
        return End(f"{refusal}; beginning anew with a snapshot")


def _delay(failures: int, wait: float | None) -> float:
    """Seconds before the next connection: what the server wants, and a part of the backoff that nobody else draws."""
    backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** min(failures, 16))
    return (wait or 0.0) + random.uniform(0, backoff)  # noqa: S311 - no secret
