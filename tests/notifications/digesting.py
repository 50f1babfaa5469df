"""Rules with a digest, and a database where mails are gathered and digests closed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from notification_service import gathered, lanes, rules
from notification_service.assemble import assemble
from notification_service.channels.email import Mail
from notification_service.compose import Composer
from notification_service.digester import Digester
from notification_service.domain import Cursor, Notification
from notification_service.inbox import Inbox
from notification_service.store import digests as store
from notification_service.store import feed as rows
from notification_service.store import reads
from notification_service.templates import Templates
from notification_service.windows import Window
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, Events, batch, write
from tidings.notifications.v1 import digests_pb2, notifications_pb2
from tidings.users.v1 import users_pb2

LOG_ID = uuid.uuid4()
LEASE = 30.0

RULES = """
[[digests]]
name = "hourly"
window = "1h"
category = "social"
template = "gathered"
most = 3

[[rules]]
name = "renamed"
on = ["UPDATED"]
changed_fields = ["display_name"]
template = "single"
category = "social"
channels = ["email", "in_app"]
digest = "hourly"

[[rules]]
name = "moved"
on = ["UPDATED"]
changed_fields = ["email"]
template = "single"
category = "social"
channels = ["email"]
recipients = ["previous", "current"]
digest = "hourly"

[[rules]]
name = "gone"
on = ["DELETED"]
template = "single"
category = "account"
channels = ["email"]
"""

# Says which events are in a mail, and what each said of its user.
GATHERED = (
    "{% for item in items %}[{{ item.event.position }} {{ item.user.display_name }}|{{ item.subject }}]{% endfor %}"
)


def compose_of(path: Path, text: str = RULES, *, said: str = GATHERED) -> Composer:
    """A composer of these rules; `said` is what a digest says."""
    folder = path / "templates"
    folder.mkdir(exist_ok=True)
    for name, subject, words in (("gathered", "{{ items | length }} changes", said), ("single", "{{ name }}", "one")):
        write(folder / f"{name}.subject.txt", subject)
        write(folder / f"{name}.txt", words)
        write(folder / f"{name}.html", words)
    told = rules.read(write(path / "rules.toml", text))
    made = Composer(told.rules, Templates(folder), lanes.writers(SENDER, ()), digests=told.digests)
    made.check()
    return made


@dataclass
class Site:
    """An inbox, and one who closes."""

    composer: Composer
    pool: Pool
    connection: Connection
    closed: int = 0

    async def store(self, *events: users_pb2.UserEvent, connection: Connection | None = None) -> Cursor:
        """What a replica does with a batch."""
        cursor = replace(await rows.read_cursor(self.connection), log_id=LOG_ID)
        return await Inbox(self.composer, lambda: None).store(connection or self.connection, cursor, batch(*events))

    def digester(self, pool: Pool | None = None) -> Digester:
        """Another one who closes."""

        def count() -> None:
            self.closed += 1

        return Digester(pool or self.pool, self.composer, count, lease=LEASE, poll_interval=0.05)

    async def pass_time(self, time: timedelta) -> None:
        """Lets what is open be older."""
        await self.connection.execute(
            "UPDATE digests SET open_time = open_time - %(t)s, close_time = close_time - %(t)s,"
            " lease_until = lease_until - %(t)s WHERE state = 1",
            {"t": time},
        )

    async def all(self, query: str) -> list[tuple[Any, ...]]:
        """Rows."""
        return await (await self.connection.execute(query.encode())).fetchall()

    async def close_all(self) -> None:
        """Closes whatever is open, after a week."""
        await self.pass_time(timedelta(days=8))
        while await self.digester().close_due():
            pass

    async def digests(self) -> list[digests_pb2.Digest]:
        """All, the newest first."""
        return [one for _, one in await store.page(self.connection, {}, 1 << 62, 1000)]

    async def deliveries(self) -> list[notifications_pb2.Delivery]:
        """All, the newest first."""
        return [one.delivery for one in await reads.list_deliveries(self.connection, {}, 1 << 62, 1000)]

    async def mails(self) -> dict[str, Mail]:
        """What deliveries carry, by their ids."""
        return {str(row[0]): Mail.decode(row[1]) for row in await self.all("SELECT delivery_id, content FROM contents")}


def renamed(events: Events, user: users_pb2.User, name: str = "Ada") -> users_pb2.UserEvent:
    return events.updated(user, display_name=name)


def said(site: Site, window: Window, views: Sequence[str]) -> Notification:
    """What one who has taken a digest makes of it."""
    planned = gathered.plan(window, views, "gathered")
    [made] = assemble([planned], site.composer.templates.current, site.composer.writers)
    return made
