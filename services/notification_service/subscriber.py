"""The subscriber: shares the user feed with the other replicas, and follows the shards that are this one's.

A replica says that it lives, looks how the feed is shared, and acts, three times in a lease. A lease that is over costs
a replica its shards as soon as another takes them, and each change of an owner begins another epoch. That is for speed
only: that no event has two effects is the inbox's doing, which refuses whoever has not the newest epoch of a shard.

Beside leases there is a session lock, which replicas share: of a release that knows no leases one replica follows the
feed, and has that lock alone. As long as one does, these stand by, unless nothing was stored for so long that it must
be hung.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid

import psycopg

from notification_service.domain import Hold
from notification_service.follower import LONGEST_PAUSE, Follower, Source
from notification_service.inbox import Inbox
from notification_service.shards import plan
from notification_service.store import feed
from notification_service.store import shards as leases
from notification_service.store.shards import Division, Replica
from servicekit import database, logs, tasks
from servicekit.database import Connection, Pool

log = logs.get(__name__)

__all__ = ["LONGEST_PAUSE", "Subscriber"]

_APPLICATION = "tidings-notifications-shards"
_FIRST_PAUSE = 0.1
_TURNS_PER_LEASE = 3.5
_LOOK_FOR_LOCK = 1.0
# A batch that takes longer, seconds: given up with its shard, or as if this loop did not go round itself.
_LONGEST_BATCH, _ILL_AFTER = 2.0, 5.0
_SESSION = {"idle_in_transaction_session_timeout": "5s", "statement_timeout": "5s"}


class Subscriber:
    """`run` is a loop for the caller's supervisor. `shards` is into how many the feed is to be divided, `lease` and
    `patience` are in seconds.
    """

    def __init__(
        self, url: str, pool: Pool, inbox: Inbox, source: Source, *, shards: int, lease: float, patience: float
    ) -> None:
        self._url = url
        self._pool = pool
        self._inbox = inbox
        self._source = source
        self._lease = lease
        self._patience = patience
        self._me = Replica(uuid.uuid4(), shards)
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._followers: dict[Hold, Follower] = {}
        # Held while the replica looks and acts, and for good once the process drains.
        self._turning = asyncio.Lock()
        self._disagreement: set[int] = set()

    @property
    def refused(self) -> str:
        """Why the feed cannot be followed until an operator does something; empty if it can."""
        return "; ".join(sorted({one.refused for one in self._followers.values() if one.refused}))

    async def run(self) -> None:
        """Shares the feed, and again after whatever went wrong."""
        pause = _FIRST_PAUSE
        try:
            while True:
                self._beat()
                began = asyncio.get_running_loop().time()
                try:
                    async with await database.connect(self._url, _APPLICATION, **_SESSION) as connection:
                        await self._share(connection)
                except database.AWAY as error:
                    log.warning("shards: database not reachable", error=str(error).strip(), retry_seconds=pause)
                if asyncio.get_running_loop().time() - began > 2 * LONGEST_PAUSE:
                    pause = _FIRST_PAUSE
                self._forget_ended()
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
        finally:
            await self._stop(list(self._followers), 0.0)

    def _beat(self) -> None:
        """A follower that hangs is a hung loop, too."""
        if all(one.stores_for() < _ILL_AFTER for one in self._followers.values()):
            tasks.beat()

    async def _share(self, connection: Connection) -> None:
        await self._stand_by(connection)
        while True:
            self._beat()
            async with self._turning:
                await self._turn(connection)
            await asyncio.sleep(self._lease / _TURNS_PER_LEASE)

    async def _stand_by(self, connection: Connection) -> None:
        """Returns when no replica of an earlier release follows the feed."""
        await feed.read_cursor(connection)
        said = False
        while not await leases.may_follow(connection):
            self._beat()
            if await feed.silence(connection) > self._patience:
                log.warning("taking over: the replica that subscribes has stored nothing for long")
                return
            await self._stop(list(self._followers), _LONGEST_BATCH)
            if not said:
                log.info("standing by: a replica of an earlier release follows the user feed")
                said = True
            await asyncio.sleep(_LOOK_FOR_LOCK)

    async def _turn(self, connection: Connection) -> None:
        """Says that this replica lives, looks, and acts."""
        self._forget_ended()
        await leases.beat(connection, self._me, self._name, self._lease)
        seen = await leases.look(connection)
        self._say_disagreement(seen)
        if all(one.id != self._me.id for one in seen.replicas):
            return  # paused for so long that the lease is over again
        todo = plan(seen, self._me.id)
        if todo.divide:
            await self._divide(connection, seen, todo.divide)
            seen = await leases.look(connection)
            todo = plan(seen, self._me.id)
        mine = {Hold(self._me.id, one.shard, one.of, one.epoch) for one in todo.mine}
        await self._stop([hold for hold in self._followers if hold not in mine], _LONGEST_BATCH)
        if todo.give_up:
            await leases.give_up(connection, self._me.id, [one.shard for one in todo.give_up])
            log.info("shards are left to others", shards=[one.shard for one in todo.give_up])
        if todo.take:
            mine |= set(await leases.take(connection, self._me.id, todo.take))
        for hold in sorted(mine - self._followers.keys(), key=lambda one: one.shard):
            log.info("taking a shard", shard=hold.shard, of=hold.of, epoch=hold.epoch)
            follower = self._followers[hold] = Follower(hold, self._pool, self._inbox, self._source)
            follower.start()

    async def _divide(self, connection: Connection, seen: Division, of: int) -> None:
        try:
            if await leases.divide(connection, seen, of):
                log.info("the user feed is divided", shards=of, before=len(seen.shards))
        except psycopg.errors.LockNotAvailable:
            log.info("the user feed is divided later: somebody stores what was made of events", shards=of)

    def _say_disagreement(self, seen: Division) -> None:
        wanted = {one.shards for one in seen.replicas}
        if len(wanted) > 1 and wanted != self._disagreement:
            log.warning(
                "replicas want different numbers of shards: it stays as it is until they agree",
                wanted=sorted(wanted),
                shards=len(seen.shards),
            )
        self._disagreement = wanted if len(wanted) > 1 else set()

    def _forget_ended(self) -> None:
        for hold in [hold for hold, one in self._followers.items() if one.has_ended()]:
            del self._followers[hold]

    async def _stop(self, holds: list[Hold], timeout: float) -> None:
        followers = [self._followers.pop(hold) for hold in holds]
        await asyncio.gather(*(one.stop(timeout) for one in followers))

    async def drain(self, timeout: float) -> None:
        """Stores no further batch; leaves the shards to other replicas."""
        try:
            async with asyncio.timeout(timeout):
                await self._turning.acquire()
        except TimeoutError:
            log.warning("shards are not left to others at shutdown: their leases have to end")
        await self._stop(list(self._followers), timeout)
        try:
            async with self._pool.connection() as connection:
                await leases.leave(connection, self._me.id)
        except psycopg.OperationalError as error:
            log.warning("shards are not left to others at shutdown", error=str(error).strip())
