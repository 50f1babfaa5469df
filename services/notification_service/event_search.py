"""Finds one event of a user in the user feed again, as long as the feed retains it."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc.aio

from tidings.client import ApiError, FeedError, PositionExpiredError, UserFeed
from tidings.client.feed import Start
from tidings.users.v1 import users_pb2

# An event's id has the time at which it was made, by a clock that is not the one of commit times.
_CLOCKS = timedelta(minutes=1)
_VERSION_WITH_TIME = 7


@dataclass(frozen=True, slots=True)
class Found:
    """The event, or why there is none: the feed does not retain it any more, or `problem`."""

    event: users_pb2.UserEvent | None = None
    expired: bool = False
    problem: str = ""


async def find(users: grpc.aio.Channel, user_id: uuid.UUID, event_id: uuid.UUID, *, timeout: float) -> Found:
    """Looks for at most `timeout` seconds."""
    if event_id.version != _VERSION_WITH_TIME:
        return Found(problem="this is no id of an event")
    made = datetime.fromtimestamp((event_id.int >> 80) / 1000, UTC)
    try:
        async with asyncio.timeout(timeout):
            return await _find(users, user_id, event_id, made)
    except TimeoutError:
        return Found(problem=f"the user feed did not give it within {timeout:g} s")
    except (FeedError, ApiError, grpc.aio.AioRpcError) as error:
        return Found(problem=f"the user feed cannot be asked: {error}")


async def _find(users: grpc.aio.Channel, user_id: uuid.UUID, event_id: uuid.UUID, made: datetime) -> Found:
    try:
        return await _look(users, user_id, event_id, made - _CLOCKS)
    except PositionExpiredError:
        # It may be among the first that are retained. Else those are later ones.
        found = await _look(users, user_id, event_id, "earliest")
        return found if found.event else Found(expired=True)


async def _look(users: grpc.aio.Channel, user_id: uuid.UUID, event_id: uuid.UUID, start: Start) -> Found:
    feed = UserFeed(users, start=start, user_ids=[str(user_id)], include_previous=True, progress=True)
    async with aclosing(aiter(feed)) as batches:
        async for batch in batches:
            for event in batch.events:
                if event.id == str(event_id):
                    return Found(event)
            if batch.caught_up:
                break
    return Found(problem="the user feed has no such event of this user")
