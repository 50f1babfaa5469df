"""The client for programs without an event loop: the same names, for plain threads.

    with sync.connect("localhost:50051") as channel:
        ada = sync.Users(channel).create(User(username="ada", email="ada@example.com"))
        for batch in sync.UserFeed(channel, cursor=FileCursor("mirror.cursor")):
            ...

Calls return when the answer is there, and loops wait for what comes next. Whatever interrupts the waiting thread,
Ctrl-C for instance, cancels the call, and is raised once the call has ended. Do not fork once a channel has been
opened.
"""

from tidings.client.sync.bridge import Channel, CursorStore, connect
from tidings.client.sync.feeds import NotificationFeed, UserFeed
from tidings.client.sync.services import (
    Digests,
    InApp,
    Notifications,
    Preferences,
    Sends,
    Templates,
    Users,
    WebhookEndpoints,
)

__all__ = [
    "Channel",
    "CursorStore",
    "Digests",
    "InApp",
    "NotificationFeed",
    "Notifications",
    "Preferences",
    "Sends",
    "Templates",
    "UserFeed",
    "Users",
    "WebhookEndpoints",
    "connect",
]
