"""The subscriber: follows the user feed and hands each batch to the inbox.

Of several replicas one subscribes: the one whose session holds an advisory lock. The others stand by, and one takes
over when the lock is free, or when nothing was stored for so long that its holder must be hung. The lock saves work
only; that no event has two effects is the inbox's doing, which refuses whoever comes second, and that one reads the
cursor again.

The lock and the inbox's transactions share one connection: who loses it has lost both.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import grpc.aio
import psycopg

from notification_service import metrics
from notification_service.domain import Cursor
from notification_service.inbox import CursorMovedError, Inbox
from notification_service.store import feed
from servicekit import database, logs, tasks
from servicekit.database import Connection
from tidings.client import Batch, CursorStore, FeedError, FeedRefusedError, GapError

log = logs.get(__name__)

_APPLICATION = "tidings-notifications-inbox"
_LOOK_FOR_LOCK = 1.0
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

# A paused process must not hold the cursor: the server ends its transaction.
_SESSION = {"idle_in_transaction_session_timeout": "5s", "statement_timeout": "30s"}


class _Position(CursorStore):
    """Where the feed goes on: always what the inbox has stored, which is why saving is nobody else's business."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor

    async def load(self) -> str | None:
        return self.cursor.resume_token

    async def save(self, token: str) -> None:
        pass


class Subscriber:
    """`run` is a loop for the caller's supervisor."""

    def __init__(
        self,
        url: str,
        inbox: Inbox,
        *,
        open_feed: Callable[[CursorStore], AsyncGenerator[Batch, None]],
        log_id: Callable[[], Awaitable[uuid.UUID]],
        patience: float,
    ) -> None:
        self._url = url
        self._inbox = inbox
        self._open_feed = open_feed
        self._log_id = log_id
        self._patience = patience
        # Held while a batch is stored, and for good once the process drains.
        self._storing = asyncio.Lock()
        self._draining = False
        self._connection: Connection | None = None
        # Why the feed cannot be followed until an operator does something; empty if it can.
        self.refused = ""

    async def run(self) -> None:
        """Subscribes, and again after whatever went wrong."""
        pause = _FIRST_PAUSE
        while True:
            tasks.beat()
            began = asyncio.get_running_loop().time()
            try:
                async with await database.connect(self._url, _APPLICATION, **_SESSION) as connection:
                    self._connection = connection
                    await self._follow_or_wait(connection)
            except CursorMovedError as error:
                log.info("another replica processes events", reason=str(error))
            except (psycopg.OperationalError, psycopg.errors.IdleInTransactionSessionTimeout) as error:
                if not self._draining:
                    log.warning("inbox: database not reachable", error=str(error).strip(), retry_seconds=pause)
            except grpc.aio.AioRpcError as error:
                known = f"{error.code().name}: {error.details()}"
                if error.code() in _NOT_LET_IN:
                    self.refused = f"the user service does not let this one in: {error.code().name}"
                log.warning("the user service cannot be asked", error=known, retry_seconds=pause)
            finally:
                self._connection = None
            if self._draining:
                await asyncio.Event().wait()  # until the supervisor ends this loop
            if asyncio.get_running_loop().time() - began > 2 * LONGEST_PAUSE:
                pause = min(pause, _FIRST_PAUSE)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _follow_or_wait(self, connection: Connection) -> None:
        """Follows the feed; waits a while, or for another cursor, once it cannot be followed."""
        try:
            await self._follow(connection)
        except FeedError as error:
            reason = error.error.reason if isinstance(error, FeedRefusedError) else type(error).__name__
            self.refused = f"the user feed cannot be followed: {reason}"
            advice = _ADVICE.get(reason, f"look at the user service's log; {_RESET}")
            log.error("the user feed cannot be followed", error=f"{type(error).__name__}: {error}", do=advice)
        stuck_at = await feed.read_cursor(connection)
        until = asyncio.get_running_loop().time() + _REFUSED_PAUSE
        while asyncio.get_running_loop().time() < until:
            tasks.beat()
            await asyncio.sleep(_LOOK_FOR_RESET)
            if await self._was_moved(connection, stuck_at):
                return

    async def _was_moved(self, connection: Connection, cursor: Cursor) -> bool:
        """Whether somebody else has moved the cursor: then what was refused here is over."""
        now = await feed.read_cursor(connection)
        if (now.log_id, now.resume_token) == (cursor.log_id, cursor.resume_token):
            return False
        self.refused = ""
        return True

    async def _follow(self, connection: Connection) -> None:
        cursor = await feed.read_cursor(connection)
        await self._stand_by(connection, cursor)
        # Read again, for while this replica stood by another moved it.
        cursor = await feed.read_cursor(connection)
        if cursor.log_id is None:
            cursor = replace(cursor, log_id=await self._log_id())
        log.info("following the user feed", position=cursor.position)
        position = _Position(cursor)
        async with aclosing(self._open_feed(position)) as batches:
            while True:
                # The feed finds out by itself that a connection is dead, and a user service may be away for long.
                with tasks.resting():
                    batch = await anext(batches)
                async with self._storing:
                    position.cursor = await self._store(connection, position.cursor, batch)
                self.refused = ""

    async def _store(self, connection: Connection, cursor: Cursor, batch: Batch) -> Cursor:
        # The feed checks that batches follow each other; that the first follows the cursor only we can tell.
        if cursor.resume_token is not None and batch.previous_position != cursor.position:
            raise GapError("the previous position of a batch", cursor.position, batch.previous_position)
        return await self._inbox.store(connection, cursor, batch)

    async def _stand_by(self, connection: Connection, cursor: Cursor) -> None:
        """Returns when this replica is the one to subscribe; `cursor` is where it stood before."""
        said = False
        while not await feed.try_subscribe(connection):
            tasks.beat()
            if self.refused:
                await self._was_moved(connection, cursor)
            metrics.stands_by()
            if await feed.silence(connection) > self._patience:
                log.warning("taking over: the replica that subscribes has stored nothing for long")
                return
            if not said:
                log.info("standing by: another replica follows the user feed")
                said = True
            await asyncio.sleep(_LOOK_FOR_LOCK)

    async def drain(self, timeout: float) -> None:
        """Stores no further batch; lets another replica subscribe."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._storing.acquire()
        except TimeoutError:
            log.warning("a batch was given up at shutdown")
        if self._connection is not None:
            await self._connection.close()
