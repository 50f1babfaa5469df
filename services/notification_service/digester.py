"""The digester: closes digests whose window is over; each becomes a notification with one mail.

Whoever takes a digest has it for a while, and nothing goes into it from then on. What it becomes is said outside of any
transaction and stored in one, under ids that follow from its own. So two that close the same digest, after a pause or a
kill, make one mail of it, whichever is first.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence

import psycopg

from notification_service import gathered
from notification_service.assemble import assemble
from notification_service.compose import Composer
from notification_service.domain import Notification
from notification_service.plans import Plan
from notification_service.store import digests
from notification_service.windows import Window
from servicekit import database, logs, tasks
from servicekit.database import Pool

log = logs.get(__name__)

# So many are taken at a time and stored together; what they say is rendered together, of so many items or one digest.
_MOST = 20
_ITEMS_AT_ONCE = 1000
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
        while True:
            taken = await database.insist(self.close_due, "digests: database not reachable")
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
        made: list[Notification] = []
        for windows in _divided(taken):
            tasks.beat()
            made += await asyncio.to_thread(self._compose, windows, views)
        if await self._store(made):
            self._closed()

    def _compose(self, windows: Sequence[Window], views: Mapping[uuid.UUID, Sequence[str]]) -> list[Notification]:
        plans = [self._plan(window, views[window.id]) for window in windows]
        return assemble(plans, self._composer.templates.current, self._composer.writers)

    def _plan(self, window: Window, items: Sequence[str]) -> Plan:
        digest = self._composer.digests.get(window.name)
        # Of a digest that is in the file no more the template is the one that it had.
        template = digest.template if digest else window.template
        link = self._composer.unsubscribe(window.user_id, window.category, window.target)
        return gathered.plan(window, items, template, link)

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


def _divided(taken: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows in their order, at least one at a time."""
    some: list[Window] = []
    items = 0
    for window in taken:
        if some and items + window.items > _ITEMS_AT_ONCE:
            yield some
            some, items = [], 0
        some.append(window)
        items += window.items
    if some:
        yield some
