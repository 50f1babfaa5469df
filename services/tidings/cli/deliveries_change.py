"""`tidings deliveries replay|discard`: what becomes of parked deliveries."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, TypedDict

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import NOTIFICATIONS_ADDRESS, Json, NotificationsAddress, examples, notifications_at
from tidings.client import Notifications
from tidings.notifications.v1 import notifications_pb2

_PARKED = notifications_pb2.Delivery.PARKED

# Of all that would be changed so many are counted before it is asked.
_MOST_COUNTED = 10_000

_Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Parked deliveries, at most 1,000.")]
_AllParked = Annotated[
    bool, typer.Option("--all-parked", help="All that are parked and match, instead of some by their ids.")
]
_User = Annotated[str, typer.Option("--user", metavar="ID", help="With --all-parked: only those to this user.")]
_Notification = Annotated[
    str, typer.Option("--notification", metavar="ID", help="With --all-parked: only those of this notification.")
]
_Channel = Annotated[
    str, typer.Option("--channel", help="With --all-parked: only those over this channel: email or webhook.")
]
_Reason = Annotated[str, typer.Option("--reason", help="Why; kept with the delivery, at most 500 characters.")]
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before all that match are changed.")]


class _Filters(TypedDict):
    user_id: str
    notification_id: str
    channel: str


@dataclass(frozen=True, slots=True)
class _Verb:
    """A change, in words and at the service."""

    question: str
    done: str
    of_ids: Callable[..., Awaitable[int]]
    of_all: Callable[..., Awaitable[int]]


_REPLAY = _Verb("Try {} again?", "replayed", Notifications.replay, Notifications.replay_all)
_DISCARD = _Verb(
    "Discard {}? They cannot be tried again.", "discarded", Notifications.discard, Notifications.discard_all
)

_REPLAY_HELP = """Try parked deliveries again, at once and as often as new ones.

The other side gets the same Message-ID or webhook-id. By ids it is all or none: exit code 4 if one does not exist,
5 if one is not parked, for instance because an earlier run has done it. Exit code 2 if the question is not answered
with yes.
"""
_REPLAY_EXAMPLES = examples(
    "tidings deliveries replay ID --reason 'the mailbox is back'",
    "tidings deliveries replay --all-parked --channel email --reason 'the mail server is mended'",
)
_DISCARD_HELP = """End parked deliveries for good.

They stay in the list. By ids it is all or none: exit code 4 if one does not exist, 5 if one is not parked. Exit
code 2 if the question is not answered with yes.
"""
_DISCARD_EXAMPLES = examples(
    "tidings deliveries discard ID --reason 'a test address'",
    "tidings deliveries discard --all-parked --user ID --yes",
)


def register(group: typer.Typer) -> None:
    """Adds the commands."""
    for name, verb, text, shown in (
        ("replay", _REPLAY, _REPLAY_HELP, _REPLAY_EXAMPLES),
        ("discard", _DISCARD, _DISCARD_HELP, _DISCARD_EXAMPLES),
    ):
        group.command(name, help=text, epilog=shown)(_command(verb))


def _command(verb: _Verb) -> Callable[..., None]:
    def command(
        ids: _Ids = None,
        all_parked: _AllParked = False,
        user_id: _User = "",
        notification_id: _Notification = "",
        channel: _Channel = "",
        reason: _Reason = "",
        yes: _Yes = False,
        address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
        as_json: Json = False,
    ) -> None:
        filters: _Filters = {"user_id": user_id, "notification_id": notification_id, "channel": channel}
        _change(verb, ids or [], all_parked, filters, reason, yes, address, as_json)

    return command


def _change(
    verb: _Verb,
    ids: list[str],
    all_parked: bool,
    filters: _Filters,
    reason: str,
    yes: bool,
    address: str,
    as_json: bool,
) -> None:
    if bool(ids) == all_parked:
        raise typer.BadParameter("give ids, or --all-parked")
    if ids and any(filters.values()):
        raise typer.BadParameter("--user, --notification and --channel go with --all-parked")

    async def body() -> None:
        async with notifications_at(address) as notifications:
            if ids:
                changed = await verb.of_ids(notifications, ids, reason=reason)
            else:
                if not yes:
                    _confirm(verb, await _count(notifications, filters))
                changed = await verb.of_all(notifications, **filters, reason=reason)
        output.write([output.json_line({verb.done: changed}) if as_json else f"{changed} {verb.done}"])

    run(body())


async def _count(notifications: Notifications, filters: _Filters) -> str:
    count = 0
    async for _ in notifications.deliveries(**filters, state=_PARKED):
        count += 1
        if count == _MOST_COUNTED:
            return f"{count} or more deliveries"
    return "1 delivery" if count == 1 else f"{count} deliveries"


def _confirm(verb: _Verb, what: str) -> None:
    # On standard error, all of it: standard output carries data only.
    output.err.print(f"{verb.question.format(what)} [y/N]", end=" ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing is changed: answer with y, or give --yes", ExitCode.USAGE)
