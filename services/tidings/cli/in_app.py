"""`tidings notifications inbox list|counts|watch|seen|read|unread|archive|unarchive`: the in-app inbox of one user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
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
)
from tidings.cli.users_watch import From, FromOption, LimitEvents
from tidings.client import InApp
from tidings.notifications.v1 import in_app_pb2, notifications_pb2

app = typer.Typer(
    help="The in-app inbox of one user.",
    epilog=examples(
        "tidings notifications inbox list USER --unread",
        "tidings notifications inbox read USER --up-to 120",
        "tidings notifications inbox watch USER",
    ),
    no_args_is_help=True,
)

_UPDATE = in_app_pb2.UpdateInAppNotificationsRequest


class Archived(StrEnum):
    """What becomes of archived notifications in a list."""

    LEFT_OUT = "left-out"
    ONLY = "only"
    INCLUDED = "included"


_ARCHIVED = {Archived.LEFT_OUT: False, Archived.ONLY: True, Archived.INCLUDED: None}

_User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
_Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Notifications of this user, at most 1,000.")]
_UpTo = Annotated[
    int | None,
    typer.Option("--up-to", min=1, metavar="POSITION", help="All up to this position, instead of some by their ids."),
]

_COLUMNS = ("POSITION", "CREATED", "STATE", "CATEGORY", "SUBJECT", "ID")


@asynccontextmanager
async def _inbox(address: str, user_id: str) -> AsyncIterator[InApp]:
    async with channel_to("notification service", address) as channel:
        yield InApp(channel, user_id)


def _state(one: notifications_pb2.Notification) -> str:
    state = "read" if one.HasField("read_time") else "seen" if one.HasField("seen_time") else "new"
    return f"{state} archived" if one.HasField("archive_time") else state


@app.command("list", epilog=examples("tidings notifications inbox list USER --unread --category security --json"))
def list_notifications(
    user_id: _User,
    unread: Annotated[bool, typer.Option("--unread", help="Only what is not read.")] = False,
    unseen: Annotated[bool, typer.Option("--unseen", help="Only what is not seen.")] = False,
    archived: Annotated[Archived, typer.Option("--archived", help="What is archived.")] = Archived.LEFT_OUT,
    category: Annotated[str, typer.Option("--category", help="Only those of this category.")] = "",
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List the in-app notifications of a user, newest first."""

    def row(one: notifications_pb2.Notification) -> list[str]:
        return [str(one.position), output.time(one.create_time), _state(one), one.category, one.subject, one.id]

    async def body() -> None:
        async with _inbox(address, user_id) as inbox:
            found = inbox.list(
                unread=unread,
                unseen=unseen,
                archived=_ARCHIVED[archived],
                category=category,
                page_size=listing.page_size(limit, everything),
            )
            await listing.show(found, _COLUMNS, row, limit=limit, everything=everything, as_json=as_json)

    run(body())


@app.command(epilog=examples("tidings notifications inbox counts USER --json"))
def counts(user_id: _User, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Print how many are there that are not archived, and of those unseen and unread."""

    async def body() -> None:
        async with _inbox(address, user_id) as inbox:
            found = await inbox.counts()
        output.write([output.json_line(found) if as_json else watching.counted(found)])

    run(body())


@app.command(epilog=examples("tidings notifications inbox watch USER --from earliest --json"))
def watch(
    user_id: _User,
    start: FromOption = None,
    limit: LimitEvents = None,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Print the notifications of a user as they come, and the counts whenever they have become others.

    Runs until Ctrl-C. Reconnects by itself, without a gap.
    """

    async def body() -> None:
        async with _inbox(address, user_id) as inbox:
            stream = inbox.watch(start=(start or From.NOW).value)
            await watching.follow(stream, limit, as_json=as_json, counts=True)

    run(body())


_HELP = """{}

By ids it is all or none: exit code 4 if one is no in-app notification of this user. May be repeated.
"""


def _register(name: str, change: in_app_pb2.UpdateInAppNotificationsRequest.Change.ValueType, what: str) -> None:
    def command(
        user_id: _User,
        ids: _Ids = None,
        up_to: _UpTo = None,
        address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
        as_json: Json = False,
    ) -> None:
        _change(change, user_id, ids or [], up_to, address, as_json)

    shown = examples(
        f"tidings notifications inbox {name} USER ID", f"tidings notifications inbox {name} USER --up-to 120"
    )
    made: Callable[[Callable[..., None]], object] = app.command(name, epilog=shown, help=_HELP.format(what))
    made(command)


_register("seen", _UPDATE.SEEN, "Mark notifications as seen.")
_register("read", _UPDATE.READ, "Mark notifications as read, and so as seen.")
_register("unread", _UPDATE.UNREAD, "Mark notifications as not read; they stay seen.")
_register("archive", _UPDATE.ARCHIVE, "Archive notifications: they are neither listed nor counted.")
_register("unarchive", _UPDATE.UNARCHIVE, "Bring notifications back from the archive.")


def _change(
    change: in_app_pb2.UpdateInAppNotificationsRequest.Change.ValueType,
    user_id: str,
    ids: list[str],
    up_to: int | None,
    address: str,
    as_json: bool,
) -> None:
    if bool(ids) == (up_to is not None):
        raise typer.BadParameter("give ids, or --up-to")

    async def body() -> None:
        async with _inbox(address, user_id) as inbox:
            answer = await (inbox.change_all(change, up_to) if up_to is not None else inbox.change(change, ids))
        said = f"{answer.changed} changed; {watching.counted(answer.counts)}"
        output.write([output.json_line(answer) if as_json else said])

    run(body())
