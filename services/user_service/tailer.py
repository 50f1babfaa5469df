"""Keeps the window at the head of the log: this process's commits at once, those of other replicas after a hint or a
poll.

Positions become visible in order, for every batch of every replica commits under the feed's lock. So the events after
the window's head, read in one statement, always continue it, unless retention has removed what follows it: a process
that was paused for that long begins its window anew. Anything else is a broken log, which ends the process.
NOTIFY is only a hint that arrives sooner than the next poll: it is sent after a commit on a connection of its own, many
commits to one.
"""

from __future__ import annotations

import asyncio
import contextlib

import psycopg
from sqlalchemy import Text, bindparam, cast, func, literal_column, select

from servicekit import database, flush, logs, tasks
from servicekit.database import Connection
from servicekit.flush import Call, statement
from user_service import reads
from user_service.events import Entry
from user_service.window import Window

log = logs.get(__name__)

_CHANNEL = "tidings_feed"
_PAGE = 1000
_PENDING_ENTRIES = 10_000
_LONGEST_RECONNECT = 2.0
_NOTIFY = statement("notify", select(func.pg_notify(literal_column(f"'{_CHANNEL}'"), cast(bindparam("head"), Text))))
_HINT_PAUSE = 0.02


class Tailer:
    """The only writer of the window. Its loops are run by the caller's supervisor."""

    def __init__(self, url: str, window: Window, poll_interval: float) -> None:
        self._url = url
        self._window = window
        self._poll_interval = poll_interval
        self._hint = asyncio.Event()
        self._committed = asyncio.Event()
        # Own commits that wait for other replicas' earlier ones, by their first position.
        self._pending: dict[int, list[Entry]] = {}
        self.read_ok = False

    def committed(self, entries: list[Entry]) -> None:
        """Takes the events of this process's own commit."""
        if not entries:
            return
        self._committed.set()
        if entries[0].position == self._window.head + 1:
            self._window.append(entries)
            self._append_pending()
            return
        if sum(len(waiting) for waiting in self._pending.values()) < _PENDING_ENTRIES:
            self._pending[entries[0].position] = entries
        self._hint.set()

    def _append_pending(self) -> None:
        while (entries := self._pending.pop(self._window.head + 1, None)) is not None:
            self._window.append(entries)
        if self._pending:
            for first in [first for first in self._pending if first <= self._window.head]:
                del self._pending[first]

    def hint(self) -> None:
        """Something may have been committed that nobody has told of."""
        self._hint.set()

    async def run(self) -> None:
        """Reads what follows the window's head: at a hint, or when the poll interval is over."""
        delay = 0.05
        while True:
            tasks.beat()
            try:
                async with await database.connect(self._url, "tidings-users-tailer") as connection:
                    delay = 0.05
                    while True:
                        await self._read(connection)
                        self.read_ok = True
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(self._poll_interval):
                                await self._hint.wait()
            except psycopg.OperationalError as error:
                self.read_ok = False
                log.warning("feed cannot be read", error=str(error).strip(), retry_seconds=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_RECONNECT)

    async def _read(self, connection: Connection) -> None:
        while True:
            tasks.beat()
            self._hint.clear()
            after = self._window.head
            # Own commits that wait are not read again: only up to the first of them.
            upto = min(self._pending, default=after + _PAGE + 1) - 1
            entries = await reads.events(connection, after, min(max(upto, after + 1), after + _PAGE))
            if not entries or entries[0].position > after + 1:
                await self._catch_up_with_retention(connection)
            self._window.append(entries)
            self._append_pending()
            if len(entries) < _PAGE and not self._pending:
                return
            if not entries:
                # What a pending commit waits for is committed, hence visible to the next read.
                await asyncio.sleep(0.001)

    async def _catch_up_with_retention(self, connection: Connection) -> None:
        """Begins the window anew at the log's head if what follows the window is no longer retained."""
        state = await reads.feed_state(connection)
        if state.earliest > self._window.head + 1:
            log.warning(
                "the log was removed past this replica's place", head=self._window.head, earliest=state.earliest
            )
            self._window.reset(state.head, state.head_time)
            self._window.wake_all()

    async def listen(self) -> None:
        """Turns notifications of other replicas into hints."""
        delay = 0.05
        while True:
            try:
                async with await database.connect(self._url, "tidings-users-listener") as connection:
                    await connection.execute(f"LISTEN {_CHANNEL}")
                    delay = 0.05
                    self._hint.set()  # whatever was notified before LISTEN is not told again
                    async for notification in connection.notifies():
                        if int(notification.payload) > self._window.head:
                            self._hint.set()
            except psycopg.OperationalError as error:
                log.warning("hints cannot be heard; polling goes on", error=str(error).strip(), retry_seconds=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_RECONNECT)

    async def notify(self) -> None:
        """Tells other replicas of this process's commits: the newest position, as fast as Postgres takes it."""
        delay = 0.05
        while True:
            try:
                # A hint needs no durability: its transaction does not wait for the disk.
                async with await database.connect(
                    self._url, "tidings-users-notifier", synchronous_commit="off"
                ) as connection:
                    await flush.prepare(connection, [_NOTIFY])
                    delay = 0.05
                    while True:
                        await self._committed.wait()
                        self._committed.clear()
                        await flush.run(connection, [Call(_NOTIFY, {"head": self._window.head})])
                        # The first hint goes at once; under load one for many commits is enough.
                        await asyncio.sleep(_HINT_PAUSE)
            except psycopg.OperationalError as error:
                log.warning("hints cannot be sent; other replicas poll", error=str(error).strip(), retry_seconds=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_RECONNECT)
