"""The newest in-app notifications in memory, and who waits for more of them.

One loop per process looks for new notifications, at a hint of this process's own inbox or by a poll, and wakes every
stream. What it read last stays in a window, so that streams at the head share one read; a stream further back reads
for itself. While there are no streams only the head's position is read. Positions become visible in their order, for
they are taken under the lock of the inbox's row.

The same loop looks whether the in-app inboxes of those users who have a stream were changed, here or by another
replica: each has a version, which is cheap to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from notification_service.store import in_app, reads
from servicekit import database
from servicekit.database import Pool
from tidings.notifications.v1 import notifications_pb2

_PAGE = 1000
_WINDOW = 2000


class Tail:
    """`run` is a loop for the caller's supervisor."""

    def __init__(self, pool: Pool, poll_interval: float) -> None:
        self._pool = pool
        self._poll_interval = poll_interval
        self._hint = asyncio.Event()
        self._window: deque[notifications_pb2.Notification] = deque()
        self._streams = 0
        self._users: Counter[uuid.UUID] = Counter()
        self._versions: dict[uuid.UUID, int] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        # Every in-app notification in (`floor`, `head`] is in the window.
        self._floor = 0
        self.head = 0

    def hint(self) -> None:
        """There may be new notifications, or some that were marked."""
        self._hint.set()

    @contextmanager
    def watching(self, user_id: uuid.UUID | None) -> Iterator[None]:
        """A stream is open, of one user or of all."""
        self._streams += 1
        if user_id is not None:
            self._users[user_id] += 1
        try:
            yield
        finally:
            self._streams -= 1
            if user_id is not None:
                self._users[user_id] -= 1
                if not self._users[user_id]:
                    del self._users[user_id]
                    self._versions.pop(user_id, None)

    def version(self, user_id: uuid.UUID) -> int:
        """The newest version of a user's in-app inbox that was seen while there was a stream of that user."""
        return self._versions.get(user_id, 0)

    async def run(self) -> None:
        """Keeps up with the head."""
        while True:
            self._hint.clear()
            await database.insist(self._read, "notifications cannot be read")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval):
                    await self._hint.wait()

    async def _read(self) -> None:
        async with self._pool.connection() as connection:
            head = await reads.head(connection)
            shared = self._streams > 0 and 0 < head - self.head <= _PAGE
            found = await reads.tail(connection, self.head, head, _PAGE) if shared else []
            versions = await in_app.versions(connection, self._users) if self._users else {}
        # Streams may have ended meanwhile.
        versions = {user_id: version for user_id, version in versions.items() if user_id in self._users}
        marked = any(version > self.version(user_id) for user_id, version in versions.items())
        self._versions |= versions
        if head > self.head:
            self._advance(head, found if shared else None)
        elif not marked:
            return
        self.wake_all()

    def _advance(self, head: int, found: list[notifications_pb2.Notification] | None) -> None:
        """Moves the head; None is found where nobody looked, and the window begins anew."""
        if found is None:
            self._window.clear()
            self._floor = head
        self._window.extend(found or ())
        while len(self._window) > _WINDOW:
            self._floor = self._window.popleft().position
        self.head = head

    def covers(self, position: int) -> bool:
        """Whether everything after a position is in the window."""
        return position >= self._floor

    def after(self, position: int) -> list[notifications_pb2.Notification]:
        """What the window has after a position that it covers."""
        found = []
        for one in reversed(self._window):
            if one.position <= position:
                break
            found.append(one)
        found.reverse()
        return found

    def wake_all(self) -> None:
        """Wakes every waiting stream."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout: float) -> None:
        """Returns at the next wake-up, or after `timeout` seconds."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiters.discard(waiter)
