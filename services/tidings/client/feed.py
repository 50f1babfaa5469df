"""The feed of users: every committed change, in order, without a gap, over restarts of either side."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import grpc.aio
from google.protobuf import duration_pb2

from tidings.client.cursor import CursorStore
from tidings.client.follow import Follower, LostPlace
from tidings.client.reader import Source, Stretch
from tidings.users.v1 import users_pb2, users_pb2_grpc

Start = Literal["earliest", "now", "snapshot"] | datetime


@dataclass(frozen=True, slots=True)
class Batch(Stretch[users_pb2.UserEvent]):
    """Events that follow each other. It ends where a token may stand: an atomic group is never split.

    `snapshot` is "begin", "within" or "end" in a snapshot: between the two every living user that the feed selects
    comes once, as an event of type SNAPSHOT; who keeps a copy drops every user that was not named. `Replica` does that.
    """


class UserFeed:
    """Follows WatchUsers:

        async for batch in UserFeed(channel, cursor=FileCursor("mirror.cursor")):
            ...

    The feed begins after the cursor's token, or at `start` if there is none: the earliest event, now, a snapshot, or
    the first event committed at or after a time (which must have a time zone). It never ends by itself. It reconnects
    whenever that can help. A batch counts as processed, and its token is saved, when the next one is asked for: leave
    the loop, or raise in it, and the same batch comes again.

    `user_ids` and `labels` select users: an event comes if its user matched before or after the change, and has
    `left_filter` set if it no longer does. `types` and `changed_fields` select events, and exclude snapshots. `shard`,
    (index, count), selects the users of one of `count` equal parts. A token is good only for the selection it is of.

    `snapshot_on` names the errors after which the feed begins anew with a snapshot instead of raising, as `except`
    does: PositionExpiredError, or LostPlaceError for a log that was restored or replaced, too. `include_previous` asks
    for the user before each change. `linger` lets a message of a live feed wait for more events, at most 1 s: fewer and
    larger batches. With `progress` there are also batches without events, which tell how far the feed is (bookmarks,
    caught_up).

    One reader at a time. `contextlib.aclosing(aiter(feed))` ends the call at once when the loop is left early.
    Raises GapError if the server leaves something out or repeats it, and a FeedRefusedError if it refuses the stream.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        cursor: CursorStore | None = None,
        start: Start = "earliest",
        snapshot_on: LostPlace = (),
        user_ids: Collection[str] | None = None,
        labels: Mapping[str, str] | None = None,
        types: Collection[users_pb2.UserEvent.Type.ValueType] | None = None,
        changed_fields: Collection[str] | None = None,
        shard: tuple[int, int] | None = None,
        include_previous: bool = False,
        bookmark_interval: float = 10.0,
        max_batch: int = 1000,
        linger: float = 0.0,
        progress: bool = False,
    ) -> None:
        if isinstance(start, datetime) and start.tzinfo is None:
            raise ValueError(f"start: {start} has no time zone")
        if (start == "snapshot" or snapshot_on) and (types is not None or changed_fields is not None):
            raise ValueError("types and changed_fields select events; a snapshot has none to select")
        stub = users_pb2_grpc.UserServiceStub(channel)
        asked = users_pb2.WatchUsersRequest(
            filter=_filter(user_ids=user_ids, labels=labels, types=types, changed_fields=changed_fields),
            shard=_shard(shard),
            include_previous=include_previous,
            bookmark_interval=interval_message(bookmark_interval),
            max_batch=max_batch,
            linger=interval_message(linger),
        )

        def call(token: str | None, anew: bool) -> grpc.aio.UnaryStreamCall[Any, users_pb2.WatchUsersResponse]:
            request = users_pb2.WatchUsersRequest()
            request.CopyFrom(asked)
            if token is not None:
                request.resume_token = token
            else:
                _begin(request, "snapshot" if anew else start)
            return stub.WatchUsers(request)

        source = Source(
            "user feed",
            call,
            lambda message: message.events,
            _head_time,
            Batch,
            dense=not (asked.HasField("filter") or asked.HasField("shard")),
        )
        self._follower = Follower(
            source, cursor=cursor, bookmark_interval=bookmark_interval, progress=progress, snapshot_on=snapshot_on
        )

    def __aiter__(self) -> AsyncGenerator[Batch, None]:
        return self._follower.follow()


def interval_message(seconds: float) -> duration_pb2.Duration:
    """Seconds as a request has them."""
    message = duration_pb2.Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def _filter(**selected: Collection[Any] | Mapping[str, str] | None) -> users_pb2.WatchUsersRequest.Filter | None:
    given = {name: value for name, value in selected.items() if value is not None}
    for name, value in given.items():
        # To the server an empty list is none, which selects everything.
        if not value or isinstance(value, str):
            raise ValueError(f"{name}: must name at least one, not {value!r}; leave it out to select everything")
    return users_pb2.WatchUsersRequest.Filter(**given) if given else None  # type: ignore[arg-type] # its own fields


def _shard(shard: tuple[int, int] | None) -> users_pb2.WatchUsersRequest.Shard | None:
    if shard is None:
        return None
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard: {index} of {count}; the index goes from 0 to the count less 1")
    return users_pb2.WatchUsersRequest.Shard(index=index, count=count)


def _begin(request: users_pb2.WatchUsersRequest, start: Start) -> None:
    match start:
        case datetime():
            request.since.FromDatetime(start)
        case "now":
            request.now.SetInParent()
        case "snapshot":
            request.snapshot.SetInParent()
        case "earliest":
            request.earliest.SetInParent()


def _head_time(message: users_pb2.WatchUsersResponse) -> datetime | None:
    if not message.bookmark.HasField("head_time"):
        return None
    return message.bookmark.head_time.ToDatetime(tzinfo=UTC)
