"""Keeps this service's own copy of the users: whom a send may go to.

One replica at a time follows the user feed for it, whole and from a snapshot, as any subscriber would; a short lease
says which. That is for speed only: a batch is stored with the place that it leads to, from the place that it follows,
and by the newest epoch of the lease, so none is stored twice and none is skipped.

A copy is only a copy. Where its place in the feed is lost, for whatever reason, it begins anew with a snapshot, and
stays as it was until that has ended; users that the snapshot has not named are deleted then.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from notification_service import metrics
from notification_service.domain import Person
from notification_service.store import recipients as store
from notification_service.store.recipients import Held, HoldLostError, Named
from servicekit import database, logs, tasks
from servicekit.database import Pool
from tidings.client import (
    BadTokenError,
    Batch,
    CursorStore,
    FeedError,
    FeedRefusedError,
    LostPlaceError,
    PositionExpiredError,
    TokenMismatchError,
    leaves,
)
from tidings.users.v1 import users_pb2

log = logs.get(__name__)

_FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
_TURNS_PER_LEASE = 3.5
# A feed that is refused is for an operator to look at; asking on costs little and finds out when it is mended.
_REFUSED_PAUSE = 30.0
# A batch that takes longer, seconds: as if this loop did not go round itself.
_ILL_AFTER = 5.0


@dataclass(frozen=True, slots=True)
class Source:
    """The user feed: how it is opened where a cursor is, without a token with a snapshot, and which log it is of."""

    open: Callable[[CursorStore], AsyncGenerator[Batch, None]]
    log_id: Callable[[], Awaitable[uuid.UUID]]


class _Place(CursorStore):
    """Where the feed goes on: always what is stored, which is why saving is nobody else's business."""

    def __init__(self, held: Held) -> None:
        self.held = held

    async def load(self) -> str | None:
        return self.held.token

    async def save(self, token: str) -> None:
        pass


class Recipients:
    """`run` is a loop for the caller's supervisor. `moved` is called when the copy is further; `lease`: seconds."""

    def __init__(self, pool: Pool, source: Source, moved: Callable[[], None], *, lease: float) -> None:
        self._pool = pool
        self._source = source
        self._moved = moved
        self._lease = lease
        self._me = uuid.uuid4()
        self._storing_since: float | None = None
        self._draining = False

    async def run(self) -> None:
        """Keeps the copy as long as no other replica does, and again after whatever went wrong."""
        pause = _FIRST_PAUSE
        while True:
            tasks.beat()
            try:
                held = await self._take()
                pause = _FIRST_PAUSE
                if held is not None:
                    log.info("keeping the copy of the users", epoch=held.epoch)
                    await self._keep(held)
            except database.AWAY as error:
                log.warning("recipients: database not reachable", error=str(error).strip(), retry_seconds=pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            await asyncio.sleep(min(self._lease / _TURNS_PER_LEASE, LONGEST_PAUSE))

    async def _take(self) -> Held | None:
        if self._draining:
            return None
        async with self._pool.connection() as connection:
            return await store.take(connection, self._me, self._lease)

    async def _keep(self, held: Held) -> None:
        """Follows the feed until the hold is over."""
        following = asyncio.create_task(self._follow(_Place(held)), name="recipients feed")
        try:
            while not following.done():
                if self._storing_since is None or asyncio.get_running_loop().time() - self._storing_since < _ILL_AFTER:
                    tasks.beat()
                await asyncio.wait({following}, timeout=self._lease / _TURNS_PER_LEASE)
                if not following.done() and not await self._renew(held):
                    break
            else:
                following.result()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            metrics.recipients_left()
        log.info("another replica keeps the copy of the users, or may", epoch=held.epoch)

    async def _renew(self, held: Held) -> bool:
        try:
            async with self._pool.connection() as connection:
                return await store.renew(connection, held, self._lease)
        except database.AWAY:
            # Who cannot reach the database cannot store either, and another may have the lease by then.
            return True

    async def _follow(self, place: _Place) -> None:
        pause = _FIRST_PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._read(place)
            except HoldLostError:
                return
            except (LostPlaceError, BadTokenError, TokenMismatchError) as error:
                if not await self._begin_anew(place, error):
                    return
            except FeedError as error:
                log.error("the copy of the users cannot go on", error=f"{type(error).__name__}: {error}")
                pause = _REFUSED_PAUSE
            except database.AWAY as error:
                log.warning("recipients: database not reachable", error=str(error).strip(), retry_seconds=pause)
            except grpc.aio.AioRpcError as error:
                log.warning("the user service cannot be asked", error=f"{error.code().name}", retry_seconds=pause)
            if asyncio.get_running_loop().time() - began > 2 * LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _begin_anew(self, place: _Place, error: FeedRefusedError) -> bool:
        """Whether the copy is still this replica's to begin anew."""
        # An expired position is one of this history; of any other the versions may not compare.
        other = not isinstance(error, PositionExpiredError)
        log.warning(
            "the copy of the users begins anew with a snapshot", error=type(error).__name__, other_history=other
        )
        while True:
            try:
                async with self._pool.connection() as connection:
                    place.held = await store.forget_place(connection, place.held, other_history=other)
            except HoldLostError:
                return False
            except database.AWAY:
                await asyncio.sleep(LONGEST_PAUSE)
            else:
                return True

    async def _read(self, place: _Place) -> None:
        async with aclosing(self._source.open(place)) as batches:
            async for batch in batches:
                self._storing_since = asyncio.get_running_loop().time()
                inside = place.held.inside or batch.snapshot is not None
                try:
                    with metrics.copying(place.held.position, batch, inside=inside) as stored:
                        place.held = await self._store(place.held, batch)
                        stored(place.held.position)
                finally:
                    self._storing_since = None
                if batch.events or batch.snapshot:
                    self._moved()

    async def _store(self, held: Held, batch: Batch) -> Held:
        log_id = None
        if batch.snapshot == "end":
            # The answer is of the log whose snapshot this was: of another the token would have been refused.
            log_id = await self._source.log_id()
            await self._sweep(held, batch.position)
        async with self._pool.connection() as connection:
            after = await store.store(
                connection,
                held,
                _named(batch),
                token=batch.resume_token,
                lease=self._lease,
                head_position=max(batch.head_position, batch.position),
                position=batch.position,
                part=batch.snapshot,
                log_id=log_id,
            )
        if batch.snapshot == "end":
            log.info("the copy of the users is whole", position=batch.position, snapshot=after.snapshot)
        return after

    async def _sweep(self, held: Held, position: int) -> None:
        after: uuid.UUID | None = store.NOBODY
        while after is not None:
            async with self._pool.connection() as connection:
                after = await store.sweep(connection, held, after, position)

    async def drain(self) -> None:
        """Leaves the copy to other replicas."""
        self._draining = True
        try:
            async with self._pool.connection() as connection:
                await store.leave(connection, self._me)
        except database.AWAY as error:
            log.warning("the copy of the users is not left to others at shutdown", error=str(error).strip())


def _named(batch: Batch) -> list[Named]:
    """What a batch says of users: of each the newest, in the order of their ids."""
    newest: dict[str, users_pb2.UserEvent] = {event.user.id: event for event in batch.events}
    return sorted((_one(event) for event in newest.values()), key=lambda one: one.user_id)


def _one(event: users_pb2.UserEvent) -> Named:
    user = event.user
    user_id = uuid.UUID(user.id)
    if leaves(event):
        deleted = user.delete_time if user.HasField("delete_time") else event.commit_time
        return Named(user_id, user.version, None, _time(deleted))
    person = Person(
        user_id,
        user.version,
        user.username,
        user.email,
        user.display_name,
        user.locale,
        user.time_zone,
        dict(user.labels),
        _time(user.create_time) if user.HasField("create_time") else None,
        _time(user.update_time) if user.HasField("update_time") else None,
    )
    return Named(user_id, user.version, person)


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
