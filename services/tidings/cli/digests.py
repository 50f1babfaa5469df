"""`tidings digests list|show|flush`: mails that are gathered, and go out as one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated

import typer

from tidings.cli import listing, output
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
)
from tidings.client import Digests
from tidings.notifications.v1 import digests_pb2

_Digest = digests_pb2.Digest

_LIST_EXAMPLES = examples(
    "tidings digests list --state open",
    "tidings digests list --user ID --name daily",
    "tidings digests list --notification ID --json",
)
_SHOW_EXAMPLES = examples("tidings digests show ID", "tidings notifications list --digest ID")
_FLUSH_EXAMPLES = examples("tidings digests flush ID")
_COLUMNS = ("OPENED", "CLOSES", "NAME", "STATE", "ITEMS", "USER", "ADDRESS", "ID")

app = typer.Typer(
    help="Digests: mails that are gathered, and go out as one.",
    epilog=examples("tidings digests list --state open", "tidings digests flush ID"),
    no_args_is_help=True,
)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The digest.")]


class State(StrEnum):
    """How a digest stands."""

    OPEN = "open"
    CLOSED = "closed"
    CANCELLED = "cancelled"


@asynccontextmanager
async def _digests_at(address: str) -> AsyncIterator[Digests]:
    async with channel_to("notification service", address) as channel:
        yield Digests(channel)


@app.command("list", epilog=_LIST_EXAMPLES)
def list_digests(
    user_id: Annotated[str, typer.Option("--user", metavar="ID", help="Only those of this user.")] = "",
    name: Annotated[str, typer.Option("--name", help="Only those that the rules file calls so.")] = "",
    state: Annotated[State | None, typer.Option("--state", help="Only those in this state.")] = None,
    notification_id: Annotated[
        str,
        typer.Option(
            "--notification",
            metavar="ID",
            help="Only those that this notification's mails went into, or that became it.",
        ),
    ] = "",
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List digests, the newest first."""

    async def body() -> None:
        async with _digests_at(address) as digests:
            found = digests.list(
                user_id=user_id,
                name=name,
                notification_id=notification_id,
                state=_Digest.State.Value(state.name) if state else _Digest.STATE_UNSPECIFIED,
                page_size=listing.page_size(limit, everything),
            )
            await listing.show(found, _COLUMNS, _row, limit=limit, everything=everything, as_json=as_json)

    run(body())


@app.command("show", epilog=_SHOW_EXAMPLES)
def show(identity: _Id, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Show a digest, what was gathered and what it became. Exit code 4 if there is none."""

    async def body() -> None:
        async with _digests_at(address) as digests:
            _print(await digests.get(identity), as_json)

    run(body())


@app.command("flush", epilog=_FLUSH_EXAMPLES)
def flush(identity: _Id, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Close a digest at once: its mail is due now.

    One that is closed already is shown as it is. Exit code 4 if there is none, 5 if it is cancelled.
    """

    async def body() -> None:
        async with _digests_at(address) as digests:
            _print(await digests.flush(identity), as_json)

    run(body())


def _row(one: digests_pb2.Digest) -> list[str]:
    times = [output.time(one.open_time), output.time(one.close_time)]
    return [*times, one.name, _state(one), str(len(one.item_notification_ids)), one.user_id, one.target, one.id]


def _state(one: digests_pb2.Digest) -> str:
    return _Digest.State.Name(one.state).lower()


def _print(one: digests_pb2.Digest, as_json: bool) -> None:
    if as_json:
        output.write([output.json_line(one)])
        return
    output.record(
        (
            ("id", one.id),
            ("name", one.name),
            ("state", _state(one)),
            ("reason", one.end_reason),
            ("user", one.user_id),
            ("address", one.target),
            ("category", one.category),
            ("template", one.template),
            ("opened", output.time(one.open_time)),
            ("closes", output.time(one.close_time)),
            ("ended", output.time(one.end_time)),
            ("became", one.notification_id),
            *(("item", item) for item in one.item_notification_ids),
        )
    )
