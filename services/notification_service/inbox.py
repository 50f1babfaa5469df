"""The inbox: what a batch of events becomes is stored together with the cursor that has passed it, in one transaction.

The cursor's row is locked first and compared with where the batch begins; whoever finds it elsewhere stores nothing,
for another replica was there. So every event has exactly one effect, whoever processes it and however often. Dense
positions are taken under the same lock, hence in the order of commits.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC

import psycopg

from notification_service import metrics, tracing
from notification_service.compose import Composer
from notification_service.domain import Cursor, Notification
from notification_service.store import feed
from servicekit import telemetry
from servicekit.database import Connection
from tidings.client import Batch
from tidings.users.v1 import users_pb2

# Rendering is waited for in a thread, for so many events at a time.
_EVENTS_PER_TURN = 8


class CursorMovedError(Exception):
    """Another replica has stored events in the meantime."""


class Inbox:
    """Stores batches over a connection that is the caller's."""

    def __init__(self, composer: Composer, stored: Callable[[], None]) -> None:
        self._composer = composer
        self._stored = stored

    async def store(self, connection: Connection, cursor: Cursor, batch: Batch) -> Cursor:
        """Processes a batch that follows `cursor`; returns the cursor after it. Raises CursorMovedError."""
        with metrics.processing(cursor.position, batch), tracing.processing(batch.events) as spans:
            composed = await self._compose(batch.events, spans)
            try:
                with tracing.storing(spans, len(batch.events)):
                    after = await self._write(connection, cursor, batch, composed)
            except BaseException:
                await _roll_back(connection)
                raise
        if after.notification_position > cursor.notification_position:
            self._stored()
        return after

    async def _compose(self, events: Sequence[users_pb2.UserEvent], spans: tracing.Spans) -> list[Notification]:
        composed: list[Notification] = []
        for event in events:
            if (span := spans.get(event.id)) is not None:
                event.trace_parent, event.trace_state = telemetry.carried(span.get_span_context())
        for first in range(0, len(events), _EVENTS_PER_TURN):
            composed += await asyncio.to_thread(self._compose_some, events[first : first + _EVENTS_PER_TURN])
        return composed

    def _compose_some(self, events: Sequence[users_pb2.UserEvent]) -> list[Notification]:
        return [notification for event in events for notification in self._composer.compose(event)]

    async def _write(
        self, connection: Connection, cursor: Cursor, batch: Batch, composed: Sequence[Notification]
    ) -> Cursor:
        locked, known = await feed.lock_cursor(connection, [one.id for one in composed])
        if (locked.position, locked.resume_token) != (cursor.position, cursor.resume_token):
            raise CursorMovedError(f"the cursor is at {locked.position}, not at {cursor.position}")
        # Known are those of events that came before under another position: of a log that was restored.
        new = _distinct(composed, known)
        after = replace(
            cursor,
            resume_token=batch.resume_token,
            position=batch.position,
            notification_position=locked.notification_position + len(new),
            delivery_position=locked.delivery_position + sum(len(one.deliveries) for one in new),
        )
        time = batch.events[-1].commit_time.ToDatetime(tzinfo=UTC) if batch.events else None
        gone = (one for one in batch.events if one.type == users_pb2.UserEvent.DELETED)
        deleted = {uuid.UUID(one.user.id): one.position for one in gone}
        await feed.write_inbox(connection, new, locked, after, time, deleted)
        return after


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
