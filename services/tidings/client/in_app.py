"""The in-app inbox of one user: what an app shows behind its bell.

inbox = InApp(channel, user_id)
async for batch in inbox.watch():
    if batch.in_app_counts is not None:
        badge = batch.in_app_counts.unread
    for notification in batch.events:
        print(notification.subject)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Literal

import grpc.aio

from tidings.client.cursor import CursorStore
from tidings.client.notifications import NotificationBatch, NotificationFeed
from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, pages
from tidings.notifications.v1 import in_app_pb2, in_app_pb2_grpc, notifications_pb2

_LIST, _UPDATE = in_app_pb2.ListInAppNotificationsRequest, in_app_pb2.UpdateInAppNotificationsRequest
_ARCHIVED = {False: _LIST.ARCHIVED_UNSPECIFIED, True: _LIST.ONLY, None: _LIST.INCLUDED}
# What is done to all up to a position takes its time, page by page; seconds.
_BULK_TIMEOUT = 600.0


class InApp:
    """Calls InAppService for one user, and follows that user's stream. `timeout` bounds each call, in seconds.

    Every call raises ApiError. Changes may be repeated: what is so already is not changed again.
    """

    def __init__(self, channel: grpc.aio.Channel, user_id: str, *, timeout: float = TIMEOUT) -> None:
        self._channel = channel
        self._stub = in_app_pb2_grpc.InAppServiceStub(channel)
        self._user_id = user_id
        self._timeout = timeout

    async def list(
        self,
        *,
        unread: bool = False,
        unseen: bool = False,
        archived: bool | None = False,
        category: str = "",
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[notifications_pb2.Notification, None]:
        """Notifications, newest first; pages are fetched as they are needed. `archived` is None for both."""
        matching = _LIST.Filter(unread=unread, unseen=unseen, archived=_ARCHIVED[archived], category=category)
        request = _LIST(user_id=self._user_id, page_size=page_size, filter=matching)
        async for page in pages(self._stub.ListInAppNotifications, request, self._timeout):
            for notification in page.notifications:
                yield notification

    async def counts(self) -> notifications_pb2.InAppCounts:
        """How many are there that are not archived, and of those unseen and unread."""
        request = in_app_pb2.GetInAppCountsRequest(user_id=self._user_id)
        return await answer(self._stub.GetInAppCounts(request, timeout=self._timeout))

    async def change(
        self, change: in_app_pb2.UpdateInAppNotificationsRequest.Change.ValueType, ids: Iterable[str]
    ) -> in_app_pb2.UpdateInAppNotificationsResponse:
        """Marks 1 to 1,000 notifications, all of them or none. Returns how many were not so before, and the counts."""
        request = _UPDATE(user_id=self._user_id, change=change, ids=ids)
        return await answer(self._stub.UpdateInAppNotifications(request, timeout=self._timeout))

    async def change_all(
        self, change: in_app_pb2.UpdateInAppNotificationsRequest.Change.ValueType, up_to_position: int
    ) -> in_app_pb2.UpdateInAppNotificationsResponse:
        """Marks all up to a position, that of the newest notification which the user was shown; later ones are not
        touched. Returns as `change` does. Takes up to 10 minutes.
        """
        request = _UPDATE(user_id=self._user_id, change=change, up_to_position=up_to_position)
        return await answer(self._stub.UpdateInAppNotifications(request, timeout=_BULK_TIMEOUT))

    def watch(
        self,
        *,
        cursor: CursorStore | None = None,
        start: Literal["earliest", "now"] = "now",
        bookmark_interval: float = 10.0,
    ) -> AsyncGenerator[NotificationBatch, None]:
        """What arrives, and the counts at the beginning and whenever they have become others. Resumes and reconnects
        as NotificationFeed does, and raises what it raises.
        """
        feed = NotificationFeed(
            self._channel,
            cursor=cursor,
            start=start,
            user_id=self._user_id,
            bookmark_interval=bookmark_interval,
            counts=True,
        )
        return aiter(feed)
