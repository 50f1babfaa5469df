"""`tidings deliveries list`, and the group of what is done with deliveries."""

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
    notifications_at,
)
from tidings.notifications.v1 import notifications_pb2

app = typer.Typer(
    help="Deliveries: notifications on their way, with every attempt.",
    epilog=examples("tidings deliveries list --state parked", "tidings deliveries replay --all-parked"),
    no_args_is_help=True,
)

_Delivery = notifications_pb2.Delivery


class State(StrEnum):
    """How a delivery stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    PARKED = "parked"
    DISCARDED = "discarded"
    CANCELLED = "cancelled"


_COLUMNS = ("CREATED", "STATE", "CHANNEL", "TARGET", "TRIES", "LAST ATTEMPT", "WHY", "ID")

_LIST_EXAMPLES = examples(
    "tidings deliveries list --state parked",
    "tidings deliveries list --notification ID --json",
)


@app.callback()
def _group() -> None:
    pass


@app.command("list", epilog=_LIST_EXAMPLES)
def list_deliveries(
    user_id: Annotated[str, typer.Option("--user", metavar="ID", help="Only those to this user.")] = "",
    notification_id: Annotated[
        str, typer.Option("--notification", metavar="ID", help="Only those of this notification.")
    ] = "",
    channel: Annotated[str, typer.Option("--channel", help="Only those over this channel: email or webhook.")] = "",
    state: Annotated[State | None, typer.Option("--state", help="Only those in this state.")] = None,
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List deliveries, newest first."""

    async def body() -> None:
        async with notifications_at(address) as notifications:
            found = notifications.deliveries(
                user_id=user_id,
                notification_id=notification_id,
                channel=channel,
                state=_Delivery.State.Value(state.name) if state else _Delivery.STATE_UNSPECIFIED,
                page_size=listing.page_size(limit, everything),
            )
            await listing.show(found, _COLUMNS, _row, limit=limit, everything=everything, as_json=as_json)

    run(body())


def _row(delivery: notifications_pb2.Delivery) -> list[str]:
    return [
        output.time(delivery.create_time),
        _Delivery.State.Name(delivery.state).lower(),
        delivery.channel,
        delivery.target,
        str(len(delivery.attempts)),
        _attempt(delivery.attempts[-1]) if delivery.attempts else "",
        _why(delivery),
        delivery.id,
    ]


def _why(delivery: notifications_pb2.Delivery) -> str:
    if delivery.waits_for:
        return f"waits for {delivery.waits_for}"
    if delivery.state == _Delivery.PENDING and delivery.decisions and not delivery.attempts:
        return delivery.decisions[-1].detail
    return delivery.end_reason


def _attempt(attempt: notifications_pb2.Delivery.Attempt) -> str:
    outcome = _Delivery.Attempt.Outcome.Name(attempt.outcome).lower()
    provider = f"by {attempt.provider}:" if attempt.provider else ""
    return " ".join(part for part in (outcome, str(attempt.code or ""), provider, attempt.detail) if part)
