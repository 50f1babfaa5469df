"""`tidings sends create|list|show|cancel`: notifications for users by their ids or by a filter, now or later."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidings.cli import listing, output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import (
    DEFAULT_LIMIT,
    NOTIFICATIONS_ADDRESS,
    All,
    Json,
    Limit,
    NotificationsAddress,
    channel_to,
    examples,
    parsed_labels,
)
from tidings.client import Sends
from tidings.notifications.v1 import sends_pb2 as pb

app = typer.Typer(
    help="Sends: notifications for users by their ids or by a filter, now or later.",
    epilog=examples(
        "tidings sends create news --category news --channel email --user ID",
        "tidings sends create news --category news --channel in_app --label plan=gold --wait",
        "tidings sends list --state sending",
    ),
    no_args_is_help=True,
)

_SERVICE = "notification service"
_Id = Annotated[str, typer.Argument(metavar="ID", help="The send's id.")]
_Wait = Annotated[bool, typer.Option("--wait", help="Until it is sent, cancelled or failed; tells how far it is.")]


class _State(StrEnum):
    SCHEDULED = "scheduled"
    SENDING = "sending"
    SENT = "sent"
    CANCELLED = "cancelled"
    FAILED = "failed"


def _state(one: pb.Send) -> str:
    return pb.Send.State.Name(one.state).lower()


@app.command(
    epilog=examples(
        'tidings sends create announcement --category news --channel in_app --everybody --params "$(cat rain.json)"',
        """tidings sends create news --category news --channel email --user ID --params '{"what": "Rain"}'""",
        "tidings sends create news --category news --channel email --users-file ids.txt --at 2027-01-31T09:00:00+01:00",
        "tidings sends create news --category news --channel in_app --label plan=gold --locale de --dry-run",
        "tidings sends create notice --category account --channel email --everybody --wait",
    )
)
def create(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE", help="Its name, as `tidings templates list` has it.")],
    category: Annotated[str, typer.Option("--category", help="What preferences and quiet hours go by.")],
    channel: Annotated[
        list[str], typer.Option("--channel", metavar="NAME", help="email, in_app or webhook; may be repeated.")
    ],
    params: Annotated[
        str, typer.Option("--params", metavar="JSON", help="An object that the template sees as `params`.")
    ] = "",
    user: Annotated[list[str] | None, typer.Option("--user", metavar="ID", help="A user; may be repeated.")] = None,
    users_file: Annotated[
        Path | None,
        typer.Option("--users-file", metavar="FILE", exists=True, dir_okay=False, help="A file of ids, one a line."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Users with this label; may be repeated.")
    ] = None,
    username_prefix: Annotated[str, typer.Option("--username-prefix", help="Users whose name begins so.")] = "",
    email_prefix: Annotated[str, typer.Option("--email-prefix", help="Users whose address begins so.")] = "",
    locale: Annotated[
        str, typer.Option("--locale", metavar="TAG", help="Users of this locale; de is also de-AT.")
    ] = "",
    everybody: Annotated[bool, typer.Option("--everybody", help="All users.")] = False,
    at: Annotated[
        datetime | None,
        typer.Option("--at", metavar="TIME", formats=["%Y-%m-%dT%H:%M:%S%z"], help="When, with the offset to UTC."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, tell how many it would come to, and send nothing.")
    ] = False,
    request_id: Annotated[str, typer.Option("--request-id", metavar="UUID", help="Repeat a call.")] = "",
    wait: _Wait = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Send a notification to users by their ids, or to all whom a filter matches.

    Exit code 3 if something is wrong with it, 4 if there is no such template, 5 if that cannot be rendered; with --wait
    1 if the send fails.
    """
    ids = list(user or ())
    if users_file is not None:
        ids += [line.strip() for line in users_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    asked = pb.Send.Filter(
        labels=parsed_labels(label),
        username_prefix=username_prefix,
        email_prefix=email_prefix,
        locale=locale,
        all=everybody,
    )
    if bool(ids) == (asked != pb.Send.Filter()):
        raise typer.BadParameter("give users by their ids, or a filter, or --everybody")
    to = pb.Send.Recipients(user_ids=pb.Send.UserIds(ids=ids)) if ids else pb.Send.Recipients(filter=asked)
    send = pb.Send(template=template, category=category, channels=channel, recipients=to)
    send.params.update(_parsed(params))
    if at is not None:
        send.send_time.FromDatetime(at)

    async def body() -> None:
        async with channel_to(_SERVICE, address) as opened:
            sends = Sends(opened)
            made = await sends.create(send, request_id=request_id or None, validate_only=dry_run)
            if wait and not dry_run:
                made = await _ended(sends, made.id)
        _show(made, as_json)
        _check(made)

    run(body())


def _parsed(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"is no JSON: {error}", param_hint="--params") from None
    if not isinstance(given, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--params")
    return given


async def _ended(sends: Sends, send_id: str) -> pb.Send:
    """The send at its end; says on standard error how far it is."""
    said, found = "", pb.Send()
    async for found in sends.watch(send_id):
        progress = f"{_state(found)}: {found.counts.matched} users passed, {found.counts.made} notifications made"
        if progress != said:
            output.note(progress)
        said = progress
    return found


def _check(one: pb.Send) -> None:
    if one.state == pb.Send.FAILED:
        raise CommandError(f"the send failed: {one.failure}", ExitCode.UNEXPECTED)


@app.command("list", epilog=examples("tidings sends list --state scheduled", "tidings sends list --all --json"))
def list_sends(
    state: Annotated[_State | None, typer.Option("--state", help="Only those in this state.")] = None,
    category: Annotated[str, typer.Option("--category", help="Only those of this category.")] = "",
    actor: Annotated[str, typer.Option("--actor", metavar="NAME", help="Only those of this caller.")] = "",
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List sends, newest first, without their params and the ids of their users."""

    def row(one: pb.Send) -> list[str]:
        counts = f"{one.counts.made}/{one.counts.matched}"
        return [output.time(one.create_time), _state(one), one.category, one.template, " ".join(one.channels), counts,
                output.time(one.send_time), one.actor, one.id]  # fmt: skip

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            found = Sends(channel).list(
                state=pb.Send.State.Value(state.value.upper()) if state else pb.Send.STATE_UNSPECIFIED,
                category=category,
                actor=actor,
                page_size=listing.page_size(limit, everything),
            )
            columns = ["CREATED", "STATE", "CATEGORY", "TEMPLATE", "CHANNELS", "MADE/OF", "DUE", "ACTOR", "ID"]
            await listing.show(found, columns, row, limit=limit, everything=everything, as_json=as_json)

    run(body())


@app.command(epilog=examples("tidings sends show ID", "tidings sends show ID --wait --json"))
def show(
    send_id: _Id,
    wait: _Wait = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Show a send, how far it is, and what became of its users.

    With --wait exit code 1 if it fails. `tidings notifications list --send ID` has what it made.
    """

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            sends = Sends(channel)
            found = await _ended(sends, send_id) if wait else await sends.get(send_id)
        _show(found, as_json)
        if wait:
            _check(found)

    run(body())


@app.command(epilog=examples("tidings sends cancel ID"))
def cancel(send_id: _Id, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Cancel a send: no more is made of it, and what is pending is never sent. What is delivered stays."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            cancelled = await Sends(channel).cancel(send_id)
        _show(cancelled, as_json)

    run(body())


def _show(one: pb.Send, as_json: bool) -> None:
    if as_json:
        output.write([output.json_line(one)])
        return
    counts = one.counts
    skipped = ("unknown", "deleted", "no_address", "not_composed")
    output.record(
        [
            ("id", one.id),
            ("state", _state(one) if one.state else "not sent: --dry-run"),
            ("failure", one.failure),
            ("template", one.template),
            ("category", one.category),
            ("channels", " ".join(one.channels)),
            ("params", output.json_line(one.params) if one.params else ""),
            ("recipients", _recipients(one.recipients)),
            ("matched", str(counts.matched)),
            ("made", str(counts.made)),
            *((name.replace("_", " "), str(getattr(counts, name) or "")) for name in skipped),
            ("unknown ids", " ".join(one.unknown_user_ids)),
            ("actor", one.actor),
            ("due", output.time(one.send_time)),
            ("created", output.time(one.create_time)),
            ("started", output.time(one.start_time)),
            ("ended", output.time(one.end_time)),
        ]
    )


def _recipients(to: pb.Send.Recipients) -> str:
    if to.HasField("user_ids"):
        return f"{to.user_ids.total or len(to.user_ids.ids)} users by their ids"
    if to.filter.all:
        return "everybody"
    return "users with " + output.json_line(to.filter)
