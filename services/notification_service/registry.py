"""The webhook endpoints as they are now: those of the operator's file, and those made by the API.

All who compose, call or list share one `Endpoints`. It is read again when the database has changed: at once after a
change by this process, and by a loop that compares a fingerprint every so often. Nobody may use it before it was read
for the first time: what is not known looks as if it were deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

import psycopg

from notification_service.destinations import Destination, State, id_in
from notification_service.store import endpoints as store
from servicekit import database, logs
from servicekit.database import Connection, Pool

log = logs.get(__name__)

_LONGEST_ANSWER = 200


class Endpoints:
    """`run` is a loop for the caller's supervisor. Without a pool there are those of the file only. `went` is called
    when an endpoint is disabled because it is gone.
    """

    def __init__(
        self, of_file: Iterable[Destination] = (), pool: Pool | None = None, went: Callable[[], None] = lambda: None
    ) -> None:
        self._pool = pool
        self._went = went
        self.of_file = tuple(of_file)
        self._seen: tuple[int, int] | None = None
        self._gone: set[str] = set()
        self._reading = asyncio.Lock()
        self._loaded = asyncio.Event()
        self._by_target: dict[str, Destination] = {}
        self._use(())

    def __iter__(self) -> Iterator[Destination]:
        """Those that are enabled: deliveries are made for them."""
        return (one for one in self._by_target.values() if one.state is State.ENABLED)

    def _use(self, of_api: Sequence[Destination]) -> None:
        found = {one.target: one for one in (*self.of_file, *of_api)}
        self._gone = (self._gone | self._by_target.keys()) - found.keys()
        # At once: who iterates goes on over what was before.
        self._by_target = found

    def standing(self) -> list[tuple[tuple[str, ...], float]]:
        """How many there are by state, as a gauge has it."""
        found = list(self._by_target.values())
        return [((state.name.lower(),), sum(one.state is state for one in found)) for state in State]

    def paused_targets(self) -> list[str]:
        """Targets of deliveries that wait: their endpoints are disabled."""
        return [one.target for one in self._by_target.values() if one.state is State.DISABLED]

    async def loaded(self) -> None:
        """Returns when the endpoints have been read for the first time."""
        await self._loaded.wait()

    async def find(self, target: str) -> Destination | None:
        """The endpoint of a target, None if there is none; one that another replica has just made is read. Raises
        psycopg.OperationalError.
        """
        found = self._by_target.get(target)
        if found is None and target not in self._gone and self._pool is not None and id_in(target) is not None:
            await self._refresh()
            found = self._by_target.get(target)
        return found

    async def changed(self) -> None:
        """After a change by this process: reads again. If that fails the loop will."""
        try:
            await self._refresh()
        except psycopg.OperationalError as error:
            log.warning("endpoints cannot be read", error=str(error).strip())

    async def gone(self, called: Destination, answer: str) -> None:
        """An endpoint answered 410: it is disabled, unless it has another URL by now. One of the operator's file is
        the operator's to take out.
        """
        if called.position is None or self._pool is None:
            log.warning("a webhook endpoint of the file is gone: take it out", endpoint=called.name)
            return
        reason = f"answered 410 Gone: {answer[:_LONGEST_ANSWER]}" if answer else "answered 410 Gone"
        try:
            async with self._pool.connection() as connection:
                disabled = await store.disable_gone(connection, called.id, called.url, reason)
        except psycopg.OperationalError as error:
            log.warning("a gone endpoint cannot be disabled", endpoint_id=str(called.id), error=str(error).strip())
            return
        if disabled:
            # Without the answer, which may name a user.
            log.warning("webhook endpoint disabled: it answered 410 Gone", endpoint_id=str(called.id))
            self._went()
        await self.changed()

    async def _refresh(self) -> None:
        if self._pool is None:
            return
        async with self._reading, self._pool.connection() as connection:
            await self._read(connection)

    async def _read(self, connection: Connection) -> None:
        *seen, expired = await store.fingerprint(connection)
        if expired:
            await store.remove_expired(connection)
        elif (seen[0], seen[1]) == self._seen:
            return
        # What changes from here on shows in the next fingerprint.
        self._use(await store.read_all(connection))
        self._seen = (seen[0], seen[1])
        self._loaded.set()

    async def run(self, every: float) -> None:
        """Keeps up with the database, looking every so many seconds."""
        while True:
            await database.insist(self._refresh, "endpoints cannot be read")
            await asyncio.sleep(every)
