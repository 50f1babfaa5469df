"""Prints notifications of a stream as they come, and the counts of an in-app inbox."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tidings.cli import output
from tidings.client import NotificationBatch
from tidings.notifications.v1 import notifications_pb2


async def follow(
    stream: AsyncGenerator[NotificationBatch, None], limit: int | None, *, as_json: bool, counts: bool = False
) -> None:
    """Prints notifications, and with `counts` these whenever they come, until there were as many as the limit."""
    left = limit
    async with aclosing(stream) as batches:
        async for batch in batches:
            output.write((output.json_line if as_json else _line)(one) for one in batch.events[:left])
            if counts and batch.in_app_counts is not None:
                output.write([output.json_line(batch.in_app_counts) if as_json else counted(batch.in_app_counts)])
            if left is not None:
                left -= len(batch.events)
                if left <= 0:
                    return


def counted(counts: notifications_pb2.InAppCounts) -> str:
    """The counts of an in-app inbox, for people."""
    return f"{counts.total} there, {counts.unseen} unseen, {counts.unread} unread"


def _line(one: notifications_pb2.Notification) -> str:
    return output.shown(
        f"{one.position:>9}  {output.time(one.create_time)}  {one.category:<12}  {one.subject}".rstrip()
    )
