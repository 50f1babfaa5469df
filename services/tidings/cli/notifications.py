"""`tidings notifications list|watch`."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli import listing, output, watching
from tidings.cli.exits import run
from tidings.cli.options import (
    DEFAULT_LIMIT,
    NOTIFICATIONS_ADDRESS,
    All,
    Json,
    Limit,
    NotificationsAddress,
    channel_to,
    examples,
    notifications_at,
)
from tidings.cli.users_watch import From, FromOption, LimitEvents
from tidings.client import NotificationFeed
from tidings.notifications.v1 import notifications_pb2

app = typer.Typer(
    help="Notifications: what was made of the changes of users.",
    epilog=examples("tidings notifications list", "tidings notifications watch --user ID"),
    no_args_is_help=True,
)

_User = Annotated[str, typer.Option("--user", metavar="ID", help="Only those of this user.")]

_COLUMNS = ("POSITION", "CREATED", "CATEGORY", "RULE", "CHANNELS", "USER", "ID")

_LIST_EXAMPLES = examples(
    "tidings notifications list --limit 10",
    "tidings notifications list --category security --all --json",
)


@app.command("list", epilog=_LIST_EXAMPLES)
def list_notifications(
    user_id: _User = "",
    event_id: Annotated[str, typer.Option("--event", metavar="ID", help="Only those made of this event.")] = "",
    send_id: Annotated[str, typer.Option("--send", metavar="ID", help="Only those made by this send.")] = "",
    category: Annotated[str, typer.Option("--category", help="Only those of this category.")] = "",
    digest_id: Annotated[
        str, typer.Option("--digest", metavar="ID", help="Only those whose mails went into this digest, and it itself.")
    ] = "",
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List notifications, newest first."""

    def row(one: notifications_pb2.Notification) -> list[str]:
        channels = " ".join(one.channels)
        return [str(one.position), output.time(one.create_time), one.category, one.rule, channels, one.user_id, one.id]

    async def body() -> None:
        async with notifications_at(address) as notifications:
            found = notifications.list(
                user_id=user_id,
                event_id=event_id,
                send_id=send_id,
                category=category,
                digest_id=digest_id,
                page_size=listing.page_size(limit, everything),
            )
            await listing.show(found, _COLUMNS, row, limit=limit, everything=everything, as_json=as_json)

    run(body())


_WATCH_EXAMPLES = examples(
    "tidings notifications watch",
    "tidings notifications watch --user ID --from earliest --json",
)


@app.command(epilog=_WATCH_EXAMPLES)
def watch(
    user_id: _User = "",
    start: FromOption = None,
    limit: LimitEvents = None,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Print in-app notifications as they come.

    Runs until Ctrl-C. Reconnects by itself, without a gap.
    """

    async def body() -> None:
        async with channel_to("notification service", address) as channel:
            feed = NotificationFeed(channel, start=(start or From.NOW).value, user_id=user_id)
            await watching.follow(aiter(feed), limit, as_json=as_json)

    run(body())
