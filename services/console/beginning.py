"""Where in the feed to begin, to show the newest events and not all: a feed begins at a time, not at a position.

A stream tells at once at which position a time is. So longer and longer spans before the newest event are tried until
enough events are in one.
"""

from __future__ import annotations

from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Literal

import grpc.aio

from tidings.client import PositionExpiredError, UserFeed, Users

# Read at most, for each event that is wanted: reading is cheap, finding the exact time is not.
_READ_FOR_ONE = 40
_SPANS = tuple(timedelta(seconds=4**exponent) for exponent in range(12))


Start = Literal["earliest", "now"] | datetime


async def find(channel: grpc.aio.Channel, wanted: int) -> Start:
    """A start with about `wanted` events after it, more rather than less. Raises ApiError, FeedError."""
    feed = await Users(channel).feed()
    kept = feed.head_position + 1 - feed.earliest_position
    if kept <= wanted * _READ_FOR_ONE:
        return "earliest"
    head_time = feed.head_time.ToDatetime(tzinfo=UTC)
    best: Start = "now"
    for span in _SPANS:
        since = head_time - span
        try:
            events = feed.head_position - await _position_at(channel, since)
        except PositionExpiredError:
            break
        if events > wanted * _READ_FOR_ONE:
            break
        best = since
        if events >= wanted:
            break
    return best


async def _position_at(channel: grpc.aio.Channel, since: datetime) -> int:
    """The position after which a stream that begins at a time begins."""
    async with aclosing(aiter(UserFeed(channel, start=since, progress=True))) as batches:
        return (await anext(batches)).previous_position
