"""`tidings suppressions list|get|add|remove`: addresses that are not written to."""

from __future__ import annotations

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
    examples,
    preferences_at,
)
from tidings.notifications.v1 import preferences_pb2

_Suppression = preferences_pb2.Suppression

_LIST_EXAMPLES = examples("tidings suppressions list --reason bounced", "tidings suppressions list --address a@b.com")
_GET_EXAMPLES = examples("tidings suppressions get ada@example.com", "tidings suppressions get ada@example.com --json")
_ADD_EXAMPLES = examples("tidings suppressions add ada@example.com --reason complained --detail 'called on Monday'")
_REMOVE_EXAMPLES = examples("tidings suppressions remove ada@example.com")
_COLUMNS = ("CREATED", "CHANNEL", "ADDRESS", "REASON", "BY", "DETAIL")

app = typer.Typer(
    help="Suppressions: addresses that are not written to, and why.",
    epilog=examples("tidings suppressions list", "tidings suppressions add ada@example.com"),
    no_args_is_help=True,
)

_Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="The mail address, in upper or lower case.")]


class Reason(StrEnum):
    """Why an address is suppressed."""

    UNSUBSCRIBED = "unsubscribed"
    BOUNCED = "bounced"
    COMPLAINED = "complained"
    MANUAL = "manual"


@app.command("list", epilog=_LIST_EXAMPLES)
def list_suppressions(
    target: Annotated[str, typer.Option("--address", metavar="ADDRESS", help="Only this address.")] = "",
    reason: Annotated[Reason | None, typer.Option("--reason", help="Only those for this reason.")] = None,
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List suppressed addresses, in their order."""

    async def body() -> None:
        async with preferences_at(address) as preferences:
            found = preferences.suppressions(
                target=target,
                reason=_Suppression.Reason.Value(reason.name) if reason else _Suppression.REASON_UNSPECIFIED,
                page_size=listing.page_size(limit, everything),
            )
            await listing.show(found, _COLUMNS, _row, limit=limit, everything=everything, as_json=as_json)

    run(body())


@app.command("get", epilog=_GET_EXAMPLES)
def get(target: _Address, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Show why an address is suppressed, since when and by whom. Exit code 4 if it is not."""

    async def body() -> None:
        async with preferences_at(address) as preferences:
            found = await preferences.suppression(target)
        if as_json:
            output.write([output.json_line(found)])
        else:
            output.record(zip(("created", "channel", "address", "reason", "by", "detail"), _row(found), strict=True))

    run(body())


@app.command("add", epilog=_ADD_EXAMPLES)
def add(
    target: _Address,
    reason: Annotated[Reason, typer.Option("--reason", help="Why.")] = Reason.MANUAL,
    detail: Annotated[str, typer.Option("--detail", help="More about it; at most 500 characters.")] = "",
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Suppress an address. Exit code 5, and the reason, if it is already."""

    async def body() -> None:
        async with preferences_at(address) as preferences:
            made = await preferences.suppress(target, _Suppression.Reason.Value(reason.name), detail=detail)
        output.write([output.json_line(made) if as_json else f"{output.shown(made.target)} is suppressed"])

    run(body())


@app.command("remove", epilog=_REMOVE_EXAMPLES)
def remove(target: _Address, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Write to an address again. Exit code 4 if it is not suppressed."""

    async def body() -> None:
        async with preferences_at(address) as preferences:
            ended = await preferences.unsuppress(target)
        output.write([output.json_line(ended) if as_json else f"{output.shown(ended.target)} is written to again"])

    run(body())


def _row(one: preferences_pb2.Suppression) -> list[str]:
    reason = _Suppression.Reason.Name(one.reason).lower()
    return [output.time(one.create_time), one.channel, one.target, reason, one.actor, one.detail]
