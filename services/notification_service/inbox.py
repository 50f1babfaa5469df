"""The inbox: what a batch of events becomes is stored together with the cursor that has passed it, in one transaction.

The row of the shard that the events are of is locked first. Who does not own it any more, or finds its cursor elsewhere
than where the batch begins, stores nothing: another replica was there. So every event has exactly one effect, whoever
processes it and however often. Dense positions are taken under the lock of the one row that all shards share, hence in
the order of commits; it is held for one statement and the commit.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC

import psycopg

from notification_service import metrics, tracing, windows
from notification_service.compose import Composer
from notification_service.domain import Cursor, Hold, Notification
from notification_service.store import digests, feed, writes
from notification_service.store.recipients import Deletion
from servicekit import telemetry
from servicekit.database import Connection
from tidings.client import Batch, shard_of
from tidings.users.v1 import users_pb2

# Rendering is waited for in threads, for so many events at a time: while some are rendered, what was said is taken
# apart of others.
_EVENTS_PER_TURN, _TURNS_AT_ONCE = 32, 2


class CursorMovedError(Exception):
    """Another replica has stored events in the meantime."""


class HoldLostError(Exception):
    """The shard is another replica's by now, or the feed is divided anew."""


class Inbox:
    """Stores batches over a connection that is the caller's."""

    def __init__(self, composer: Composer, stored: Callable[[], None]) -> None:
        self._composer = composer
        self._stored = stored

    async def store(self, connection: Connection, cursor: Cursor, batch: Batch, hold: Hold | None = None) -> Cursor:
        """Processes a batch that follows `cursor`, of the shard that is held; without a hold, of the whole feed, as
        long as it is not divided. Returns the cursor after it. Raises CursorMovedError or HoldLostError.
        """
        events = [event for event in batch.events if _is_news(event, cursor.floors)]
        with metrics.processing(hold, cursor.position, batch), tracing.processing(events) as spans:
            composed = await self._compose(events, spans)
            try:
                with tracing.storing(spans, len(events)):
                    after = await self._write(connection, cursor, batch, composed, hold)
            except BaseException:
                await _roll_back(connection)
                raise
        if after.notification_position > cursor.notification_position:
            self._stored()
        return after

    async def _compose(self, events: Sequence[users_pb2.UserEvent], spans: tracing.Spans) -> list[Notification]:
        for event in events:
            if (span := spans.get(event.id)) is not None:
                event.trace_parent, event.trace_state = telemetry.carried(span.get_span_context())
        turns = [events[first : first + _EVENTS_PER_TURN] for first in range(0, len(events), _EVENTS_PER_TURN)]
        at_once = asyncio.Semaphore(_TURNS_AT_ONCE)

        async def take(turn: Sequence[users_pb2.UserEvent]) -> list[Notification]:
            async with at_once:
                return await asyncio.to_thread(self._composer.compose, turn)

        return [one for composed in await asyncio.gather(*map(take, turns)) for one in composed]

    async def _write(
        self,
        connection: Connection,
        cursor: Cursor,
        batch: Batch,
        composed: Sequence[Notification],
        hold: Hold | None,
    ) -> Cursor:
        locked, known = await feed.lock_cursor(connection, [one.id for one in composed], hold)
        if locked is None:
            raise HoldLostError("the shard is not this replica's any more")
        at = locked.cursor
        if (at.position, at.resume_token) != (cursor.position, cursor.resume_token):
            raise CursorMovedError(f"the cursor is at {at.position}, not at {cursor.position}")
        # Known are those of events that came before under another position: of a log that was restored.
        new = _distinct(composed, known)
        after = replace(
            cursor,
            resume_token=batch.resume_token,
            position=batch.position,
            floors=tuple(floor for floor in cursor.floors if max(floor) > batch.position),
            since=None,
        )
        gone = (one for one in batch.events if one.type == users_pb2.UserEvent.DELETED and _is_news(one, cursor.floors))
        deleted = {uuid.UUID(one.user.id): Deletion(one.position, one.user.version) for one in gone}
        made = await self._gather(connection, new, {user: one.position for user, one in deleted.items()})
        time = batch.events[-1].commit_time.ToDatetime(tzinfo=UTC) if batch.events else None
        head = max(batch.head_position, batch.position)
        stored = await writes.write_inbox(
            connection, locked, made, after, position_time=time, head_position=head, deleted=deleted
        )
        if stored is None:
            raise CursorMovedError(f"the inbox is not at {locked.inbox_position} any more")
        metrics.gathered(sum(len(one.items) for one in made))
        return stored

    async def _gather(
        self, connection: Connection, new: Sequence[Notification], deleted: Mapping[uuid.UUID, int]
    ) -> Sequence[Notification]:
        """Stores items of digests, and ends digests of the deleted. The notifications have their digests' ids then."""
        concerned = {one.user_id for one in new if one.items} | deleted.keys()
        if not concerned:
            return new
        opened, now = await digests.lock_open(connection, concerned)
        gathered = windows.gather(new, deleted, opened, self._composer.digests, now)
        await digests.write(connection, gathered)
        return gathered.notifications


def _is_news(event: users_pb2.UserEvent, floors: Sequence[Sequence[int]]) -> bool:
    """Whether no earlier division of the feed has passed an event."""
    return all(event.position > floor[shard_of(event.user.id, len(floor))] for floor in floors)


def _distinct(composed: Sequence[Notification], known: set[uuid.UUID]) -> list[Notification]:
    new: list[Notification] = []
    for one in composed:
        if one.id not in known:
            known.add(one.id)
            new.append(one)
    return new


async def _roll_back(connection: Connection) -> None:
    try:
        await connection.execute("ROLLBACK")
    except psycopg.Error:
        await connection.close()
