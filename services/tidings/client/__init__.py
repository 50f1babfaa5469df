"""The client of Tidings: follow the feed of users, change users, read notifications.

    async with connect("localhost:50051") as channel:
        ada = await Users(channel).create(users_pb2.User(username="ada", email="ada@example.com"))
        async for batch in UserFeed(channel, cursor=FileCursor("mirror.cursor")):
            apply(batch.events)

A feed goes on where its cursor is, over restarts of either side; what was handed out is never repeated or missed unless
the cursor is older. Errors are subclasses of `TidingsError`: `ApiError` for a call, `FeedError` for a feed that
reconnecting cannot help.
"""

from tidings.client.channel import connect
from tidings.client.cursor import CursorStore, FileCursor, MemoryCursor
from tidings.client.errors import (
    ApiError,
    BadTokenError,
    DivergedTokenError,
    FeedError,
    FeedRefusedError,
    ForeignTokenError,
    FutureTokenError,
    GapError,
    PositionExpiredError,
    ProtocolError,
    TidingsError,
    TokenMismatchError,
    Violation,
)
from tidings.client.feed import Batch, UserFeed
from tidings.client.notifications import NotificationBatch, NotificationFeed, Notifications
from tidings.client.users import Users

__all__ = [
    "ApiError",
    "BadTokenError",
    "Batch",
    "CursorStore",
    "DivergedTokenError",
    "FeedError",
    "FeedRefusedError",
    "FileCursor",
    "ForeignTokenError",
    "FutureTokenError",
    "GapError",
    "MemoryCursor",
    "NotificationBatch",
    "NotificationFeed",
    "Notifications",
    "PositionExpiredError",
    "ProtocolError",
    "TidingsError",
    "TokenMismatchError",
    "UserFeed",
    "Users",
    "Violation",
    "connect",
]
