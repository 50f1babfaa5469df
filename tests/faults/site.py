"""What the run works against: a Postgres of its own, replicas of the user service, and a proxy before each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg

from tests.faults.journal import Journal
from tests.harness import Database, PostgresProxy, PostgresServer, ServiceProcess, Services

# Little memory, so that streams fall behind it; streams that age; deleted users that are soon purged.
SETTINGS: dict[str, object] = {
    "window_bytes": 1 << 20,
    "page_cache_bytes": 2 << 20,
    "catch_up_readers": 2,
    "query_connections": 4,
    "poll_interval": 0.5,
    "max_stream_age": 12,
    "unknown_outcome_wait": 5,
    "deleted_kept": 60,
    "drain_time": 1,
    "reconnect_spread": 0.5,
    "grace": 1,
    # Old events are sealed and removed soon, and few at a time.
    "segment_events": 50,
    "segment_span": 5,
    "unsealed_events": 200,
    "seal_interval": 0.3,
    "retention_interval": 0.5,
}

# What a snapshot that was never ended keeps from being removed for, instead of an hour; in seconds.
_SNAPSHOTS_KEPT = 8

# Postgres may be struck again and again while a replica starts.
_REVIVAL = 90.0
# Postgres fsyncs all its files before it recovers, which takes seconds on a busy disk. Killed processes lose nothing
# that the kernel has, in memory or not.
MEMORY = Path("/dev/shm")


class GivenUpError(Exception):
    """The run cannot go on; what it wrote down until then is judged."""


class Member:
    """A process that is kept running. Whoever does something to it holds `lock`."""

    def __init__(self, number: int, process: ServiceProcess) -> None:
        self.number = number
        self.process = process
        self.lock = asyncio.Lock()
        # When it was found to have ended by itself, or was ended because it did not get ready; by `time.time()`.
        self.deaths: list[float] = []

    async def revive(self) -> None:
        """Starts it if it does not run, until it is ready. It may end because there is no database: then again. One
        that does not get ready is killed and started anew, as whoever watches its readiness would.
        """
        deadline = time.monotonic() + _REVIVAL
        while True:
            if not self.process.alive:
                await self.process.launch()
            try:
                await self.process.wait_ready(_REVIVAL / 3)
            except AssertionError as error:
                if time.monotonic() > deadline:
                    raise GivenUpError(f"replica {self.number} does not get ready") from error
                if self.process.alive:
                    self.deaths.append(time.time())
                    await self.process.kill()
                await asyncio.sleep(0.2)
            else:
                return


class Replica(Member):
    """A replica and its proxy."""

    def __init__(self, number: int, process: ServiceProcess, proxy: PostgresProxy) -> None:
        super().__init__(number, process)
        self.proxy = proxy

    @property
    def memory(self) -> int:
        """Its resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


async def supervise(members: Sequence[Member]) -> None:
    """Starts those that ended by themselves, as whoever runs them would."""
    while True:
        await asyncio.sleep(0.25)
        for member in members:
            if not member.lock.locked() and not member.process.alive:
                async with member.lock:
                    if not member.process.alive:
                        member.deaths.append(time.time())
                        await member.revive()


async def fetch(database: Database, query: str, *values: object) -> list[tuple[object, ...]]:
    """All rows of a query, asked again until the database is there."""
    while True:
        try:
            return await database.fetch(query, *values)
        except psycopg.OperationalError:
            await asyncio.sleep(0.1)


class Site:
    """All of it."""

    def __init__(
        self, postgres: PostgresServer, database: Database, replicas: list[Replica], journal: Journal, kept: float
    ) -> None:
        self.postgres = postgres
        self.database = database
        self.replicas = replicas
        self.journal = journal
        self.kept = kept

    @property
    def addresses(self) -> list[str]:
        """Where the replicas serve."""
        return [replica.process.address for replica in self.replicas]

    async def fetch(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """All rows of a query, asked again until the database is there."""
        return await fetch(self.database, query, *values)

    async def hurry(self) -> None:
        """Lets time fly for snapshots that nobody ended: an hour would be longer than the run."""
        while True:
            await asyncio.sleep(1.0)
            await self.fetch(
                "DELETE FROM open_snapshots WHERE expire_time < now() + interval '1 hour' - %s * interval '1 second'",
                _SNAPSHOTS_KEPT,
            )

    async def calm(self) -> None:
        """Returns when every replica is ready."""
        for replica in self.replicas:
            async with replica.lock:
                await replica.revive()


@asynccontextmanager
async def opened(replicas: int, journal: Journal, broken: str | None, kept: float) -> AsyncIterator[Site]:
    """A site with everything ready; ends it all. With `broken` the service runs with that fault switch. Events are kept
    for `kept` seconds where old ones are removed.
    """
    async with AsyncExitStack() as stack:
        postgres = await PostgresServer.start(MEMORY if MEMORY.is_dir() else None)
        stack.push_async_callback(postgres.stop)
        database = await postgres.users_database()
        services = Services()
        stack.push_async_callback(services.stop)
        made = []
        for number in range(replicas):
            proxy = await stack.enter_async_context(PostgresProxy(postgres.server.socket_dir))
            command = ("tests.faults.broken", broken, "serve") if broken else ("user_service", "serve")
            process = services.users(proxy.url(database), command, **SETTINGS, events_kept=kept)
            made.append(Replica(number, process, proxy))
        await asyncio.gather(*(replica.process.start() for replica in made))
        site = Site(postgres, database, made, journal, kept)
        watching = [asyncio.create_task(supervise(site.replicas)), asyncio.create_task(site.hurry())]
        try:
            yield site
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
