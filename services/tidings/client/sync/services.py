"""The clients of all services: the methods of `tidings.client`, which return when the answer is there."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from tidings.client import cursor as aio_cursor
from tidings.client import digests as aio_digests
from tidings.client import endpoints as aio_endpoints
from tidings.client import in_app as aio_in_app
from tidings.client import notifications as aio_notifications
from tidings.client import preferences as aio_preferences
from tidings.client import sends as aio_sends
from tidings.client import templates as aio_templates
from tidings.client import users as aio_users
from tidings.client.notifications import NotificationBatch
from tidings.client.sync.bridge import (
    Channel,
    Client,
    CursorStore,
    blocking,
    blocking_iteration,
    iterated,
    stored,
)
from tidings.client.unary import TIMEOUT


class Users(Client[aio_users.Users]):
    """As `tidings.client.Users`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_users.Users(channel.aio, timeout=timeout))

    create = blocking(aio_users.Users.create)
    create_batch = blocking(aio_users.Users.create_batch)
    get = blocking(aio_users.Users.get)
    get_batch = blocking(aio_users.Users.get_batch)
    list = blocking_iteration(aio_users.Users.list)
    update = blocking(aio_users.Users.update)
    delete = blocking(aio_users.Users.delete)
    undelete = blocking(aio_users.Users.undelete)
    feed = blocking(aio_users.Users.feed)


class Notifications(Client[aio_notifications.Notifications]):
    """As `tidings.client.Notifications`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_notifications.Notifications(channel.aio, timeout=timeout))

    list = blocking_iteration(aio_notifications.Notifications.list)
    deliveries = blocking_iteration(aio_notifications.Notifications.deliveries)
    explain = blocking(aio_notifications.Notifications.explain)
    replay = blocking(aio_notifications.Notifications.replay)
    replay_all = blocking(aio_notifications.Notifications.replay_all)
    discard = blocking(aio_notifications.Notifications.discard)
    discard_all = blocking(aio_notifications.Notifications.discard_all)
    inbox = blocking(aio_notifications.Notifications.inbox)


class Sends(Client[aio_sends.Sends]):
    """As `tidings.client.Sends`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_sends.Sends(channel.aio, timeout=timeout))

    create = blocking(aio_sends.Sends.create)
    get = blocking(aio_sends.Sends.get)
    list = blocking_iteration(aio_sends.Sends.list)
    cancel = blocking(aio_sends.Sends.cancel)
    watch = blocking_iteration(aio_sends.Sends.watch)


class Digests(Client[aio_digests.Digests]):
    """As `tidings.client.Digests`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_digests.Digests(channel.aio, timeout=timeout))

    list = blocking_iteration(aio_digests.Digests.list)
    get = blocking(aio_digests.Digests.get)
    flush = blocking(aio_digests.Digests.flush)


class Preferences(Client[aio_preferences.Preferences]):
    """As `tidings.client.Preferences`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_preferences.Preferences(channel.aio, timeout=timeout))

    get = blocking(aio_preferences.Preferences.get)
    update = blocking(aio_preferences.Preferences.update)
    categories = blocking(aio_preferences.Preferences.categories)
    suppress = blocking(aio_preferences.Preferences.suppress)
    suppression = blocking(aio_preferences.Preferences.suppression)
    suppressions = blocking_iteration(aio_preferences.Preferences.suppressions)
    unsuppress = blocking(aio_preferences.Preferences.unsuppress)


class Templates(Client[aio_templates.Templates]):
    """As `tidings.client.Templates`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_templates.Templates(channel.aio, timeout=timeout))

    list = blocking_iteration(aio_templates.Templates.list)
    pages = blocking_iteration(aio_templates.Templates.pages)
    preview = blocking(aio_templates.Templates.preview)
    send_test = blocking(aio_templates.Templates.send_test)
    reload = blocking(aio_templates.Templates.reload)


class WebhookEndpoints(Client[aio_endpoints.WebhookEndpoints]):
    """As `tidings.client.WebhookEndpoints`."""

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_endpoints.WebhookEndpoints(channel.aio, timeout=timeout))

    create = blocking(aio_endpoints.WebhookEndpoints.create)
    get = blocking(aio_endpoints.WebhookEndpoints.get)
    list = blocking_iteration(aio_endpoints.WebhookEndpoints.list)
    update = blocking(aio_endpoints.WebhookEndpoints.update)
    delete = blocking(aio_endpoints.WebhookEndpoints.delete)
    rotate_secret = blocking(aio_endpoints.WebhookEndpoints.rotate_secret)
    test = blocking(aio_endpoints.WebhookEndpoints.test)
    enable = blocking(aio_endpoints.WebhookEndpoints.enable)
    disable = blocking(aio_endpoints.WebhookEndpoints.disable)


class InApp(Client[aio_in_app.InApp]):
    """As `tidings.client.InApp`; `watch` takes either kind of cursor store."""

    def __init__(self, channel: Channel, user_id: str, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, aio_in_app.InApp(channel.aio, user_id, timeout=timeout))

    list = blocking_iteration(aio_in_app.InApp.list)
    counts = blocking(aio_in_app.InApp.counts)
    change = blocking(aio_in_app.InApp.change)
    change_all = blocking(aio_in_app.InApp.change_all)

    def watch(
        self,
        *,
        cursor: CursorStore | aio_cursor.CursorStore | None = None,
        start: Literal["earliest", "now"] = "now",
        bookmark_interval: float = 10.0,
    ) -> Generator[NotificationBatch, None, None]:
        """What arrives, and the counts whenever they have become others."""
        batches = self.aio.watch(cursor=stored(cursor), start=start, bookmark_interval=bookmark_interval)
        return iterated(self.channel, batches)
