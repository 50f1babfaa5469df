"""The client of Tidings: follow the feed of users, change users, read notifications.

    async with connect("localhost:50051") as channel:
        ada = await Users(channel).create(users_pb2.User(username="ada", email="ada@example.com"))
        async for batch in UserFeed(channel, cursor=FileCursor("mirror.cursor")):
            for event in batch.events:
                print(event.position, event.user.username)

A feed goes on where its cursor is, over restarts of either side; what was handed out is never repeated or missed unless
the cursor is older. `Replica` makes a copy of all users out of a feed that starts with a snapshot.
`tidings.client.sync` has the same for programs without an event loop. Events and users are the messages of the
protocol, decoded but not copied: `UserEvent` and `User` are their types.

Errors are subclasses of `TidingsError`: `ApiError` for a call, `FeedError` for a feed that reconnecting cannot help.
"""

from tidings.client.channel import connect
from tidings.client.cursor import CursorStore, FileCursor, MemoryCursor
from tidings.client.digests import Digests
from tidings.client.endpoints import WebhookEndpoints
from tidings.client.errors import (
    ApiError,
    BadTokenError,
    DivergedTokenError,
    FeedError,
    FeedRefusedError,
    ForeignTokenError,
    FutureTokenError,
    GapError,
    LostPlaceError,
    PositionExpiredError,
    ProtocolError,
    TidingsError,
    TokenMismatchError,
    Violation,
)
from tidings.client.feed import Batch, UserFeed
from tidings.client.imports import ImportFailure, ImportProgress
from tidings.client.in_app import InApp
from tidings.client.notifications import NotificationBatch, NotificationFeed, Notifications
from tidings.client.preferences import Preferences
from tidings.client.replica import Replica, leaves
from tidings.client.sends import Sends
from tidings.client.shards import shard_of
from tidings.client.templates import Templates
from tidings.client.users import Users
from tidings.users.v1.users_pb2 import User, UserEvent

__all__ = [
    "ApiError",
    "BadTokenError",
    "Batch",
    "CursorStore",
    "Digests",
    "DivergedTokenError",
    "FeedError",
    "FeedRefusedError",
    "FileCursor",
    "ForeignTokenError",
    "FutureTokenError",
    "GapError",
    "ImportFailure",
    "ImportProgress",
    "InApp",
    "LostPlaceError",
    "MemoryCursor",
    "NotificationBatch",
    "NotificationFeed",
    "Notifications",
    "PositionExpiredError",
    "Preferences",
    "ProtocolError",
    "Replica",
    "Sends",
    "Templates",
    "TidingsError",
    "TokenMismatchError",
    "User",
    "UserEvent",
    "UserFeed",
    "Users",
    "Violation",
    "WebhookEndpoints",
    "connect",
    "leaves",
    "shard_of",
]
