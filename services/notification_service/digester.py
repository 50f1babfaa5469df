"""The digester: closes digests whose window is over; each becomes a notification with one mail.

Whoever takes a digest has it for a while, and nothing goes into it from then on. What it becomes is said outside of any
transaction and stored in one, under ids that follow from its own. So two that close the same digest, after a pause or a
kill, make one mail of it, whichever is first.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence

import psycopg

from notification_service import gathered
from notification_service.compose import Composer
from notification_service.domain import EMAIL, Notification
from notification_service.store import digests
from notification_service.windows import Window
from servicekit import database, logs, tasks
from servicekit.database import Pool

log = logs.get(__name__)

# So many are taken at a time, said after one another and stored together.
_MOST = 20
_LONGEST_PAUSE = 2.0
# Two that began with the same event, closed at the same moment: the second is stored once the first is.
_TRIES = 5


class Digester:
    """`run` is a loop for the caller's supervisor. `closed` is called when there is something to deliver. A digest that
    was taken by a process that died is taken by another after `lease` seconds.
    """

    def __init__(
        self, pool: Pool, composer: Composer, closed: Callable[[], None], *, lease: float, poll_interval: float
    ) -> None:
        self._pool = pool
        self._composer = composer
        self._closed = closed
        self._lease = lease
        self._poll_interval = poll_interval
        # One at a time: connections are for the inbox in the first place.
        self._flushing = asyncio.Lock()

    async def run(self) -> None:
        """Closes what is due."""
        pause = 0.05
        while True:
            tasks.beat()
            try:
                taken = await self.close_due()
                pause = 0.05
            except database.AWAY as error:
                log.warning("digests: database not reachable", error=str(error).strip(), retry_seconds=pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            if taken < _MOST:
                await asyncio.sleep(self._poll_interval)

    async def close_due(self) -> int:
        """Closes some that are due; how many were taken. Raises what the database says."""
        async with self._pool.connection() as connection:
            taken = await digests.take(connection, _MOST, self._lease)
        await self._close(taken)
        return len(taken)

    async def flush(self, identity: uuid.UUID) -> None:
        """Closes a digest now, unless it is not open or somebody is about to. Raises what the database says."""
        async with self._flushing:
            async with self._pool.connection() as connection:
                taken = await digests.flush(connection, identity, self._lease)
            await self._close([taken] if taken else [])

    async def _close(self, taken: Sequence[Window]) -> None:
        if not taken:
            return
        async with self._pool.connection() as connection:
            views = await digests.items(connection, [one.id for one in taken])
        made = []
        for window in taken:
            tasks.beat()
            made.append(await asyncio.to_thread(self._compose, window, views[window.id]))
        if await self._store(made):
            self._closed()

    def _compose(self, window: Window, items: Sequence[str]) -> Notification:
        digest = self._composer.digests.get(window.name)
        # Of a digest that is in the file no more the template is the one that it had.
        template = digest.template if digest else window.template
        link = self._composer.unsubscribe(window.user_id, window.category, window.target)
        templates, writer = self._composer.templates, self._composer.writers[EMAIL]
        return gathered.compose(window, items, template, templates, writer, link)

    async def _store(self, made: Sequence[Notification]) -> int:
        for left in reversed(range(_TRIES)):
            try:
                async with self._pool.connection() as connection:
                    closed = await digests.close(connection, made)
            except psycopg.errors.UniqueViolation:
                if not left:
                    raise
            else:
                break
        problems = [delivery.problem for one in made for delivery in one.deliveries if delivery.problem]
        log.info("digests closed", digests=closed, not_composed=len(problems))
        return closed
