"""The feed of users: every committed change, in order, without a gap, over restarts of either side."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import grpc.aio
from google.protobuf import duration_pb2, empty_pb2

from tidings.client.cursor import CursorStore
from tidings.client.follow import Follower, Source, Stretch
from tidings.users.v1 import users_pb2, users_pb2_grpc


@dataclass(frozen=True, slots=True)
class Batch(Stretch[users_pb2.UserEvent]):
    """Events that follow each other. It ends where a token may stand: an atomic group is never split."""


class UserFeed:
    """Follows WatchUsers:

        async for batch in UserFeed(channel, cursor=FileCursor("mirror.cursor")):
            ...

    The feed begins after the cursor's token, or at `start` if there is none: the earliest event, now, or the first
    committed at or after a time (which must have a time zone). It never ends by itself. It reconnects whenever that can
    help. A batch counts as processed, and its token is saved, when the next one is asked for: leave
    the loop, or raise in it, and the same batch comes again. With `progress` there are also batches without events,
    which tell how far the feed is (bookmarks, caught_up). `linger` lets a message of a live feed wait for
    more events, at most 1 s: fewer and larger batches. `include_previous` asks for the user before each change too.

    One reader at a time. `contextlib.aclosing(aiter(feed))` ends the call at once when the loop is left early.
    Raises GapError if the server leaves something out or repeats it, and a FeedRefusedError if it refuses the stream.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        cursor: CursorStore | None = None,
        start: Literal["earliest", "now"] | datetime = "earliest",
        include_previous: bool = False,
        bookmark_interval: float = 10.0,
        max_batch: int = 1000,
        linger: float = 0.0,
        progress: bool = False,
    ) -> None:
        stub = users_pb2_grpc.UserServiceStub(channel)
        if isinstance(start, datetime) and start.tzinfo is None:
            raise ValueError(f"start: {start} has no time zone")
        interval, wait = interval_message(bookmark_interval), interval_message(linger)

        def call(token: str | None) -> grpc.aio.UnaryStreamCall[Any, users_pb2.WatchUsersResponse]:
            request = users_pb2.WatchUsersRequest(
                include_previous=include_previous, bookmark_interval=interval, max_batch=max_batch, linger=wait
            )
            if token is not None:
                request.resume_token = token
            elif isinstance(start, datetime):
                request.since.FromDatetime(start)
            elif start == "now":
                request.now.CopyFrom(empty_pb2.Empty())
            else:
                request.earliest.CopyFrom(empty_pb2.Empty())
            return stub.WatchUsers(request)

        source = Source("user feed", call, lambda message: message.events, _head_time, Batch, dense=True)
        self._follower = Follower(source, cursor=cursor, bookmark_interval=bookmark_interval, progress=progress)

    def __aiter__(self) -> AsyncGenerator[Batch, None]:
        return self._follower.follow()


def interval_message(seconds: float) -> duration_pb2.Duration:
    """Seconds as a request has them."""
    message = duration_pb2.Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def _head_time(message: users_pb2.WatchUsersResponse) -> datetime | None:
    if not message.bookmark.HasField("head_time"):
        return None
    return message.bookmark.head_time.ToDatetime(tzinfo=UTC)
