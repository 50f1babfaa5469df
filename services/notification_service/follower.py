"""A follower: follows one shard of the user feed and hands each batch to the inbox, as long as the shard is held.

It goes on over whatever can pass. It ends by itself only when the hold is over, which the inbox finds out: then another
replica has the shard, or the feed is divided anew.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import grpc.aio

from notification_service import metrics
from notification_service.domain import Cursor, Hold
from notification_service.inbox import CursorMovedError, HoldLostError, Inbox
from notification_service.store import feed
from servicekit import database, logs
from servicekit.database import Pool
from tidings.client import (
    ApiError,
    Batch,
    CursorStore,
    FeedError,
    FeedRefusedError,
    ForeignTokenError,
    GapError,
    PositionExpiredError,
)
from tidings.client.feed import Start

log = logs.get(__name__)

_FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
# A refused token or a gap is for an operator to look at; asking on costs little and finds out when it is mended. That
# the cursor was reset is seen sooner.
_REFUSED_PAUSE, _LOOK_FOR_RESET = 30.0, 1.0

_RESET = "python -m notification_service reset-cursor --help says what can be done"
_NOT_LET_IN = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_LET_IN = "the user service must know this service's token and allow WatchUsers and GetFeed"
# What an operator does about a refusal, by its reason.
_ADVICE = {
    "POSITION_EXPIRED": f"events were removed before they were processed here; {_RESET}",
    "FOREIGN_TOKEN": f"this is another user service's feed: set the right address, or {_RESET}",
    "DIVERGED_TOKEN": f"the users database was restored to an earlier state or failed over; {_RESET}",
    "FUTURE_TOKEN": f"the users database was restored to an earlier state; {_RESET}",
    "UNAUTHENTICATED": _LET_IN,
    "MISSING_TOKEN": _LET_IN,
    "UNKNOWN_TOKEN": _LET_IN,
    "METHOD_NOT_ALLOWED": _LET_IN,
}

# A paused process must not hold a cursor: the server ends its transaction.
STORING_SESSION: dict[str, str | int] = {
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "30s",
}

# Opens the feed of a shard, index and count, where a cursor is; where that has no token, at a start.
OpenFeed = Callable[[CursorStore, tuple[int, int], Start], AsyncGenerator[Batch, None]]


@dataclass(frozen=True, slots=True)
class Source:
    """The user feed: how it is opened, and which log it is of."""

    open: OpenFeed
    log_id: Callable[[], Awaitable[uuid.UUID]]


class _Position(CursorStore):
    """Where the feed goes on: always what the inbox has stored, which is why saving is nobody else's business.

    `cursor` is what is `stored`, and knows the log even before anything of it is.
    """

    def __init__(self, stored: Cursor) -> None:
        self.stored = self.cursor = stored

    async def load(self) -> str | None:
        return self.cursor.resume_token

    async def save(self, token: str) -> None:
        pass


class Follower:
    """Runs from `start` until the hold is over or `stop`."""

    def __init__(self, hold: Hold, pool: Pool, inbox: Inbox, source: Source) -> None:
        self.hold = hold
        self._pool = pool
        self._inbox = inbox
        self._source = source
        # Held while a batch is stored, and for good once it is to stop.
        self._storing = asyncio.Lock()
        self._storing_since: float | None = None
        self._task: asyncio.Task[None] | None = None
        # Why the feed cannot be followed until an operator does something; empty if it can.
        self.refused = ""

    def start(self) -> None:
        """Begins to follow."""
        self._task = asyncio.create_task(self._run(), name=f"shard {self.hold.shard}")

    def has_ended(self) -> bool:
        """Whether the hold is over. Raises what the follower died of."""
        if self._task is None or not self._task.done():
            return False
        self._task.result()
        return True

    def stores_for(self) -> float:
        """For how long it has been storing the batch in hand, seconds; 0 if there is none."""
        since = self._storing_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since

    async def stop(self, timeout: float) -> None:
        """Ends it between two batches, or in one that takes longer than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._storing.acquire()
        except TimeoutError:
            log.warning("a batch was given up", shard=self.hold.shard)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._go_on()
        except HoldLostError:
            log.info("another replica follows the shard, or it is no more", shard=self.hold.shard)
        finally:
            metrics.leaves(self.hold.shard)

    async def _go_on(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._follow_or_wait()
            except CursorMovedError as error:
                log.info("another replica processes events", reason=str(error))
            except database.AWAY as error:
                log.warning("inbox: database not reachable", error=str(error).strip(), retry_seconds=pause)
            except grpc.aio.AioRpcError as error:
                known = f"{error.code().name}: {error.details()}"
                if error.code() in _NOT_LET_IN:
                    self.refused = f"the user service does not let this one in: {error.code().name}"
                log.warning("the user service cannot be asked", error=known, retry_seconds=pause)
            if asyncio.get_running_loop().time() - began > 2 * LONGEST_PAUSE:
                pause = min(pause, _FIRST_PAUSE)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _follow_or_wait(self) -> None:
        """Follows the feed; waits a while, or for another cursor, once it cannot be followed."""
        position = _Position(await self._read())
        try:
            await self._follow(position)
        except FeedError as error:
            reason = error.error.reason if isinstance(error, FeedRefusedError) else type(error).__name__
            self.refused = f"the user feed cannot be followed: {reason}"
            advice = _ADVICE.get(reason, f"look at the user service's log; {_RESET}")
            log.error("the user feed cannot be followed", error=f"{type(error).__name__}: {error}", do=advice)
        stuck_at = position.stored
        until = asyncio.get_running_loop().time() + _REFUSED_PAUSE
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(_LOOK_FOR_RESET)
            now = await self._read()
            # Somebody else has moved the cursor: then what was refused here is over.
            if (now.log_id, now.resume_token) != (stuck_at.log_id, stuck_at.resume_token):
                self.refused = ""
                return

    async def _read(self) -> Cursor:
        async with self._pool.connection() as connection:
            cursor = await feed.read_shard(connection, self.hold)
        if cursor is None:
            raise HoldLostError
        return cursor

    async def _follow(self, position: _Position) -> None:
        cursor = position.cursor
        if cursor.log_id is None or cursor.resume_token is None:
            position.cursor = replace(cursor, log_id=await self._log_id(cursor))
        log.info("following the user feed", position=cursor.position, shard=self.hold.shard, of=self.hold.of)
        batches, batch = await self._begin(position)
        async with aclosing(batches):
            while True:
                async with self._storing:
                    self._storing_since = asyncio.get_running_loop().time()
                    try:
                        position.stored = position.cursor = await self._store(position.cursor, batch)
                    finally:
                        self._storing_since = None
                self.refused = ""
                batch = await anext(batches)

    async def _log_id(self, cursor: Cursor) -> uuid.UUID:
        """Of the feed. A token would tell whether it is the one that the cursor is of; without one we have to ask."""
        found = await self._source.log_id()
        if cursor.log_id not in (None, found):
            message = f"the user service's log is {found}, not {cursor.log_id}"
            raise ForeignTokenError(ApiError(grpc.StatusCode.FAILED_PRECONDITION, message, reason="FOREIGN_TOKEN"))
        return found

    async def _begin(self, position: _Position) -> tuple[AsyncGenerator[Batch, None], Batch]:
        """The feed after the cursor and its first batch; without a token, from where nothing is left out."""
        cursor = position.cursor
        shard = self.hold.shard, self.hold.of
        if cursor.resume_token is not None or not cursor.floors:
            batches = self._source.open(position, shard, "earliest")
            return batches, await _first(batches)
        # A time is found quickly, but of a shard that was quiet for long it may lie before what is retained.
        starts: list[Start] = ["earliest"] if cursor.since is None else [cursor.since, "earliest"]
        for start in starts:
            batches = self._source.open(position, shard, start)
            try:
                batch = await _first(batches)
            except PositionExpiredError:
                continue
            if batch.previous_position <= cursor.position <= batch.head_position:
                return batches, batch
            await batches.aclose()
            if cursor.position > batch.head_position:
                message = f"position {cursor.position} is beyond the head {batch.head_position}"
                reason = "FUTURE_TOKEN"
                raise FeedRefusedError(ApiError(grpc.StatusCode.FAILED_PRECONDITION, message, reason=reason))
        message = f"position {cursor.position} is not retained"
        raise PositionExpiredError(ApiError(grpc.StatusCode.OUT_OF_RANGE, message, reason="POSITION_EXPIRED"))

    async def _store(self, cursor: Cursor, batch: Batch) -> Cursor:
        # The feed checks that batches follow each other; that the first follows the cursor only we can tell.
        if cursor.resume_token is not None and batch.previous_position != cursor.position:
            raise GapError("the previous position of a batch", cursor.position, batch.previous_position)
        async with self._pool.connection() as connection:
            return await self._inbox.store(connection, cursor, batch, self.hold)


async def _first(batches: AsyncGenerator[Batch, None]) -> Batch:
    try:
        return await anext(batches)
    except BaseException:
        await batches.aclose()
        raise
