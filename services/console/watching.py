"""Follows the services by their public APIs: health, the feed, the state of feed and inbox. Loops for a supervisor."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from console import beginning, views
from console.beginning import Start
from console.live import Live
from console.standing import Standing
from servicekit import logs
from tidings.client import ApiError, FeedError, MemoryCursor, Notifications, UserFeed, Users
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

log = logs.get(__name__)

# Seconds.
_ASK_EVERY = 1.0
ASK_TIMEOUT = 2.0
_HEALTH_AGAIN = 0.3
_FEED_AGAIN = 2.0
_BOOKMARKS = 2.0

_RATES_KEPT = 60


async def follow_readiness(health: grpc.aio.Channel, standing: Standing) -> None:
    """A loop: keeps the standing at what health says of readiness."""
    stub: Any = health_pb2_grpc.HealthStub(health)
    while True:
        call = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
        error = "it ended the stream of its health"
        try:
            async for answer in call:
                standing.note(replace(standing.seen, readiness=_is_serving(answer), health_error=None))
        except grpc.aio.AioRpcError as failure:
            error = failure.details() or failure.code().name
        finally:
            call.cancel()
        standing.note(replace(standing.seen, liveness=None, readiness=None, health_error=error))
        await asyncio.sleep(_HEALTH_AGAIN)


async def follow_answers(health: grpc.aio.Channel, ask: Callable[[], Awaitable[None]], standing: Standing) -> None:
    """A loop: asks every second whether the service lives, why it is not ready if it is not, and what `ask` asks; notes
    whether there was an answer.
    """
    loop = asyncio.get_running_loop()
    while True:
        begun = loop.time()
        live, reason = await _check(health, "liveness")
        if live and standing.seen.readiness is False:
            _, reason = await _check(health, "readiness")
        standing.note(replace(standing.seen, liveness=live, reason=reason))
        try:
            await ask()
        except ApiError as error:
            standing.note(replace(standing.seen, call=(error.code.name, error.message)))
        else:
            standing.answered = datetime.now(UTC)
            standing.note(replace(standing.seen, call=None))
        await asyncio.sleep(max(0.1, begun + _ASK_EVERY - loop.time()))


async def _check(health: grpc.aio.Channel, name: str) -> tuple[bool | None, str]:
    """Whether a name of health is SERVING, and why not; None if there is no answer."""
    stub: Any = health_pb2_grpc.HealthStub(health)
    call = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=ASK_TIMEOUT)
    try:
        answer = await call
        told = {str(key): str(value) for key, value in await call.trailing_metadata() or ()}
    except grpc.aio.AioRpcError:
        return None, ""
    return _is_serving(answer), told.get("tidings-reason", "")


def _is_serving(answer: health_pb2.HealthCheckResponse) -> bool:
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass(slots=True)
class FeedWatch:
    """The user feed: its head, and its events into the ring."""

    channel: grpc.aio.Channel
    live: Live
    events_wanted: int
    feed: users_pb2.Feed | None = None
    # Events committed in each of the last seconds, oldest first.
    rates: deque[int] = field(default_factory=lambda: deque(maxlen=_RATES_KEPT))
    heard: datetime | None = None
    # The newest position that the feed itself brought: it may be ahead of the last answer.
    newest: int = 0
    problem: str = ""
    _again: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self) -> None:
        """Asks where the feed is. Raises ApiError."""
        feed = await Users(self.channel, timeout=ASK_TIMEOUT).feed()
        before, self.feed = self.feed, feed
        if before is not None and before.log_id == feed.log_id:
            self.rates.append(max(0, feed.head_position - before.head_position))
        self.live.touch()

    def reconnect(self) -> None:
        """The service is there again: a feed that pauses before it tries again need not."""
        self._again.set()

    async def follow(self) -> None:
        """A loop: the feed's events, from some time before now."""
        while True:
            try:
                start = await beginning.find(self.channel, self.events_wanted)
                self.live.begin_anew()
                self.newest = 0
                cursor = MemoryCursor()
                while True:
                    self._again.clear()
                    await self._until_again(self._read(start, cursor))
            except (ApiError, FeedError) as error:
                if str(error) != self.problem:
                    log.warning("the user feed cannot be followed", error=f"{type(error).__name__}: {error}")
                self.problem = str(error)
                self.live.touch()
            await asyncio.sleep(_FEED_AGAIN)

    async def _until_again(self, reading: Coroutine[Any, Any, None]) -> None:
        """Reads until the service came back while the feed was away. Raises what reading raises."""
        read, again = asyncio.create_task(reading), asyncio.create_task(self._again.wait())
        try:
            await asyncio.wait({read, again}, return_when=asyncio.FIRST_COMPLETED)
            if read.done():
                read.result()
        finally:
            for task in (read, again):
                task.cancel()
            await asyncio.gather(read, again, return_exceptions=True)

    async def _read(self, start: Start, cursor: MemoryCursor) -> None:
        feed = UserFeed(
            self.channel,
            cursor=cursor,
            start=start,
            include_previous=True,
            bookmark_interval=_BOOKMARKS,
            progress=True,
        )
        async with aclosing(aiter(feed)) as batches:
            async for batch in batches:
                self.heard, self.problem = datetime.now(UTC), ""
                if batch.events:
                    self.live.add(batch.events)
                    self.newest = batch.position
                # Taken: whoever cancels from here on finds the next one after it.
                cursor.token = batch.resume_token

    def view(self) -> dict[str, Any] | None:
        """For the page; None while nothing is known."""
        if self.feed is None:
            return None
        return {
            "log_id": self.feed.log_id,
            "earliest": self.feed.earliest_position,
            "head": max(self.feed.head_position, self.newest),
            "head_time": views.time(self.feed.head_time),
            "rates": list(self.rates),
            "heard": self.heard.isoformat(timespec="milliseconds") if self.heard else None,
            "problem": self.problem,
        }


@dataclass(slots=True)
class InboxWatch:
    """How far the notification service is."""

    channel: grpc.aio.Channel
    live: Live
    inbox: notifications_pb2.Inbox | None = None

    async def ask(self) -> None:
        """Asks. Raises ApiError."""
        inbox = await Notifications(self.channel, timeout=ASK_TIMEOUT).inbox()
        # What is pending may have had another attempt, which no number tells.
        if self.inbox is None or inbox.pending or _numbers(inbox) != _numbers(self.inbox):
            self.live.changes.deliveries += 1
        self.inbox = inbox
        self.live.touch()

    def view(self) -> dict[str, Any] | None:
        """For the page; None while nothing is known."""
        inbox = self.inbox
        if inbox is None:
            return None
        return {
            "log_id": inbox.log_id,
            "position": inbox.position,
            "position_time": views.time(inbox.position_time),
            "notifications": inbox.notifications,
            "pending": inbox.pending,
            "delivered": inbox.delivered,
            "parked": inbox.parked,
            "oldest_pending_time": views.time(inbox.oldest_pending_time),
        }


def _numbers(inbox: notifications_pb2.Inbox) -> tuple[int, int, int, int]:
    return inbox.notifications, inbox.pending, inbox.delivered, inbox.parked
