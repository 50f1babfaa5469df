"""`tidings deliveries explain`: why somebody got a notification, or did not."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import NOTIFICATIONS_ADDRESS, Json, NotificationsAddress, examples, notifications_at
from tidings.notifications.v1 import notifications_pb2

_Step = notifications_pb2.ExplainDeliveryResponse.Step

_COLUMNS = ("TIME", "WHAT", "VERDICT", "OF", "DETAIL")

EXAMPLES = examples(
    "tidings deliveries explain --notification ID",
    "tidings deliveries explain --send ID --user ID",
    "tidings deliveries explain --event ID --user ID --json",
)


def explain(
    event_id: Annotated[
        str, typer.Option("--event", metavar="ID", help="An event of the user feed; needs --user.")
    ] = "",
    send_id: Annotated[str, typer.Option("--send", metavar="ID", help="What a caller sent; needs --user.")] = "",
    notification_id: Annotated[str, typer.Option("--notification", metavar="ID", help="One notification.")] = "",
    user_id: Annotated[str, typer.Option("--user", metavar="ID", help="Whom it is about.")] = "",
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Say all that decided what became of an event, a send or a notification, in order."""

    async def body() -> None:
        if [bool(event_id), bool(send_id), bool(notification_id)].count(True) != 1:
            raise CommandError("exactly one of --event, --send and --notification is required", ExitCode.USAGE)
        async with notifications_at(address) as notifications:
            steps = await notifications.explain(
                event_id=event_id, send_id=send_id, notification_id=notification_id, user_id=user_id
            )
        if as_json:
            output.write(output.json_line(step) for step in steps)
        else:
            output.table(_COLUMNS, [_row(step) for step in steps])

    run(body())


def _row(step: notifications_pb2.ExplainDeliveryResponse.Step) -> list[str]:
    return [
        output.time(step.time) if step.HasField("time") else "",
        _Step.Kind.Name(step.kind).lower(),
        " ".join(part for part in (step.verdict, str(step.code or "")) if part),
        " ".join(part for part in (step.channel, step.target) if part) or step.name,
        " ".join(part for part in (step.detail, f"({step.name})" if step.name and step.channel else "") if part),
    ]
