"""Feeds for plain loops."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Literal, TypedDict, Unpack

from tidings.client import cursor as aio_cursor
from tidings.client import feed as aio_feed
from tidings.client import notifications as aio_notifications
from tidings.client.feed import Batch, Start
from tidings.client.follow import LostPlace
from tidings.client.notifications import NotificationBatch
from tidings.client.sync.bridge import Channel, CursorStore, iterated, stored
from tidings.users.v1 import users_pb2


class _UserFeedOptions(TypedDict, total=False):
    start: Start
    snapshot_on: LostPlace
    user_ids: Collection[str] | None
    labels: Mapping[str, str] | None
    types: Collection[users_pb2.UserEvent.Type.ValueType] | None
    changed_fields: Collection[str] | None
    shard: tuple[int, int] | None
    include_previous: bool
    bookmark_interval: float
    max_batch: int
    linger: float
    progress: bool


class UserFeed:
    """As `tidings.client.UserFeed`, for `for batch in feed`. The cursor store may be a blocking one or an async one."""

    def __init__(
        self,
        channel: Channel,
        *,
        cursor: CursorStore | aio_cursor.CursorStore | None = None,
        **options: Unpack[_UserFeedOptions],
    ) -> None:
        self._channel = channel
        self._feed = aio_feed.UserFeed(channel.aio, cursor=stored(cursor), **options)

    def __iter__(self) -> Generator[Batch, None, None]:
        return iterated(self._channel, aiter(self._feed))


class _NotificationFeedOptions(TypedDict, total=False):
    start: Literal["earliest", "now"]
    user_id: str
    bookmark_interval: float
    progress: bool
    counts: bool


class NotificationFeed:
    """As `tidings.client.NotificationFeed`, for `for batch in feed`, with either kind of cursor store."""

    def __init__(
        self,
        channel: Channel,
        *,
        cursor: CursorStore | aio_cursor.CursorStore | None = None,
        **options: Unpack[_NotificationFeedOptions],
    ) -> None:
        self._channel = channel
        self._feed = aio_notifications.NotificationFeed(channel.aio, cursor=stored(cursor), **options)

    def __iter__(self) -> Generator[NotificationBatch, None, None]:
        return iterated(self._channel, aiter(self._feed))
