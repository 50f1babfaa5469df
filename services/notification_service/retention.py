"""Removes what is no longer kept: notifications with all that became of them, sends, digests, marks of deleted users.

In small statements, so that nothing waits for them. What is still needed stays whatever its age, and is looked at again
in the next round. Replicas all do this, and none needs the others to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from notification_service import metrics
from notification_service.store import retention
from servicekit import database, logs, tasks
from servicekit.database import Connection, Pool

log = logs.get(__name__)

INTERVAL = 60.0


async def run(pool: Pool, kept: float, deleted_kept: float) -> None:
    """A background loop: every minute removes notifications, sends and digests that are older than `kept`, and marks
    of users who were deleted longer ago than `deleted_kept`; seconds.
    """
    while True:
        try:
            await remove(pool, timedelta(seconds=kept), timedelta(seconds=deleted_kept))
        except database.AWAY as error:
            log.warning("retention is put off", error=str(error).strip())
        await asyncio.sleep(INTERVAL)


async def remove(pool: Pool, kept: timedelta, deleted_kept: timedelta) -> None:
    """Removes all that is due, some at a time. Raises what the database says."""
    # Sends and digests last: they go with their last notification.
    removed = {
        "notifications": await _remove_notifications(pool, kept),
        "sends": await _clear(pool, kept, retention.remove_sends),
        "digests": await _clear(pool, kept, retention.remove_digests),
        "deleted_users": await _clear(pool, deleted_kept, retention.remove_tombstones),
    }
    metrics.removed(**removed)
    if any(removed.values()):
        log.info("removed what is no longer kept", **removed)


async def _remove_notifications(pool: Pool, kept: timedelta) -> int:
    count, after = 0, 0
    while True:
        tasks.beat()
        async with pool.connection() as connection:
            removed = await retention.remove_notifications(connection, kept, after)
        count += removed.count
        if removed.after is None:
            return count
        after = removed.after


async def _clear(pool: Pool, kept: timedelta, some: Callable[[Connection, timedelta], Awaitable[int]]) -> int:
    count = 0
    while True:
        tasks.beat()
        async with pool.connection() as connection:
            removed = await some(connection, kept)
        count += removed
        if removed < retention.CHUNK:
            return count
