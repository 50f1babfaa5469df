"""What was made of the changes of users: lists, parked deliveries, the in-app stream, the state of the inbox."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import grpc.aio
from google.protobuf import empty_pb2

from tidings.client.cursor import CursorStore
from tidings.client.feed import interval_message
from tidings.client.follow import Follower
from tidings.client.reader import Source, Stretch
from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, pages
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc

# What is done to all that match takes its time, page by page; seconds.
_BULK_TIMEOUT = 600.0


class Notifications:
    """Calls NotificationService. `timeout` bounds each call, in seconds. Every method raises ApiError."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = notifications_pb2_grpc.NotificationServiceStub(channel)
        self._timeout = timeout

    async def list(
        self,
        *,
        user_id: str = "",
        event_id: str = "",
        send_id: str = "",
        category: str = "",
        digest_id: str = "",
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[notifications_pb2.Notification, None]:
        """Notifications, newest first; pages are fetched as they are needed."""
        request = notifications_pb2.ListNotificationsRequest(page_size=page_size)
        if user_id or event_id or send_id or category or digest_id:
            request.filter.user_id = user_id
            request.filter.event_id = event_id
            request.filter.send_id = send_id
            request.filter.category = category
            request.filter.digest_id = digest_id
        async for page in pages(self._stub.ListNotifications, request, self._timeout):
            for notification in page.notifications:
                yield notification

    async def deliveries(
        self,
        *,
        user_id: str = "",
        notification_id: str = "",
        channel: str = "",
        state: notifications_pb2.Delivery.State.ValueType = notifications_pb2.Delivery.STATE_UNSPECIFIED,
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[notifications_pb2.Delivery, None]:
        """Deliveries with every attempt, newest first; pages are fetched as they are needed."""
        request = notifications_pb2.ListDeliveriesRequest(page_size=page_size)
        if user_id or notification_id or channel or state:
            request.filter.user_id = user_id
            request.filter.notification_id = notification_id
            request.filter.channel = channel
            request.filter.state = state
        async for page in pages(self._stub.ListDeliveries, request, self._timeout):
            for delivery in page.deliveries:
                yield delivery

    async def explain(
        self, *, event_id: str = "", send_id: str = "", notification_id: str = "", user_id: str = ""
    ) -> Sequence[notifications_pb2.ExplainDeliveryResponse.Step]:
        """All that decided what became of an event or a send for a user, or of one notification, in order."""
        request = notifications_pb2.ExplainDeliveryRequest(user_id=user_id)
        if notification_id:
            request.notification_id = notification_id
        elif send_id:
            request.send_id = send_id
        else:
            request.event_id = event_id
        return (await answer(self._stub.ExplainDelivery(request, timeout=self._timeout))).steps

    async def replay(self, ids: Iterable[str], *, reason: str = "") -> int:
        """Lets 1 to 1,000 parked deliveries be tried again, all of them or none; returns how many.

        Not repeated by itself. A repeat after a lost answer is refused with NOT_PARKED if the call was done.
        """
        request = notifications_pb2.ReplayDeliveriesRequest(ids=ids, reason=reason)
        return (await answer(self._stub.ReplayDeliveries(request, timeout=self._timeout))).replayed

    async def replay_all(
        self, *, user_id: str = "", notification_id: str = "", channel: str = "", reason: str = ""
    ) -> int:
        """Lets all parked deliveries that match be tried again; returns how many. Takes up to 10 minutes.

        May be repeated: it finds what is still parked.
        """
        kind = notifications_pb2.ReplayDeliveriesRequest
        matching = kind.Filter(user_id=user_id, notification_id=notification_id, channel=channel)
        request = kind(filter=matching, reason=reason)
        return (await answer(self._stub.ReplayDeliveries(request, timeout=_BULK_TIMEOUT))).replayed

    async def discard(self, ids: Iterable[str], *, reason: str = "") -> int:
        """Ends 1 to 1,000 parked deliveries for good, all of them or none; returns how many. Repeats are as with
        `replay`.
        """
        request = notifications_pb2.DiscardDeliveriesRequest(ids=ids, reason=reason)
        return (await answer(self._stub.DiscardDeliveries(request, timeout=self._timeout))).discarded

    async def discard_all(
        self, *, user_id: str = "", notification_id: str = "", channel: str = "", reason: str = ""
    ) -> int:
        """Ends all parked deliveries that match for good; returns how many. Repeats are as with `replay_all`."""
        kind = notifications_pb2.DiscardDeliveriesRequest
        matching = kind.Filter(user_id=user_id, notification_id=notification_id, channel=channel)
        request = kind(filter=matching, reason=reason)
        return (await answer(self._stub.DiscardDeliveries(request, timeout=_BULK_TIMEOUT))).discarded

    async def inbox(self) -> notifications_pb2.Inbox:
        """How far the user feed is processed and how deliveries stand."""
        return await answer(self._stub.GetInbox(notifications_pb2.GetInboxRequest(), timeout=self._timeout))


@dataclass(frozen=True, slots=True)
class NotificationBatch(Stretch[notifications_pb2.Notification]):
    """In-app notifications that follow each other. Positions between them are of notifications not in-app."""

    # In a feed of one user: the counts of the in-app inbox, if they came with this; None if not.
    in_app_counts: notifications_pb2.InAppCounts | None = None


class NotificationFeed:
    """Follows WatchNotifications, of one user or of all, as UserFeed follows WatchUsers.

    With `counts`, which goes with a `user_id`, there are also batches for the counts of that user's in-app inbox: when
    the feed connects, and whenever they have become others. They may have no events.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        cursor: CursorStore | None = None,
        start: Literal["earliest", "now"] = "earliest",
        user_id: str = "",
        bookmark_interval: float = 10.0,
        progress: bool = False,
        counts: bool = False,
    ) -> None:
        stub = notifications_pb2_grpc.NotificationServiceStub(channel)
        interval = interval_message(bookmark_interval)

        def call(
            token: str | None, _: bool
        ) -> grpc.aio.UnaryStreamCall[Any, notifications_pb2.WatchNotificationsResponse]:
            request = notifications_pb2.WatchNotificationsRequest(user_id=user_id, bookmark_interval=interval)
            if token is not None:
                request.resume_token = token
            elif start == "now":
                request.now.CopyFrom(empty_pb2.Empty())
            else:
                request.earliest.CopyFrom(empty_pb2.Empty())
            return stub.WatchNotifications(request)

        source = Source(
            "notifications",
            call,
            lambda message: message.notifications,
            lambda _: None,
            NotificationBatch,
            dense=False,
            more_of=_counts_of,
        )
        self._progress, self._counts = progress, counts
        self._follower = Follower(
            source, cursor=cursor, bookmark_interval=bookmark_interval, progress=progress or counts
        )

    async def __aiter__(self) -> AsyncGenerator[NotificationBatch, None]:
        async with aclosing(self._follower.follow()) as batches:
            async for batch in batches:
                if batch.events or self._progress or (self._counts and batch.in_app_counts is not None):
                    yield batch


def _counts_of(message: notifications_pb2.WatchNotificationsResponse) -> dict[str, notifications_pb2.InAppCounts]:
    return {"in_app_counts": message.in_app_counts} if message.HasField("in_app_counts") else {}
