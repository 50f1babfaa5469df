"""`tidings preferences get|set|quiet-hours`: what a user wants to be told, and when."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tidings.cli import output
from tidings.cli.exits import run
from tidings.cli.options import NOTIFICATIONS_ADDRESS, Json, NotificationsAddress, examples, preferences_at
from tidings.notifications.v1 import preferences_pb2

_Preferences = preferences_pb2.Preferences

_GET_EXAMPLES = examples("tidings preferences get ID")
_SET_EXAMPLES = examples(
    "tidings preferences set ID email off",
    "tidings preferences set ID email on --category account",
    "tidings preferences set ID email default --category account",
)
_HOURS_EXAMPLES = examples(
    "tidings preferences quiet-hours ID 22:00 07:00 --time-zone Europe/Berlin",
    "tidings preferences quiet-hours ID 00:00 00:00 --weekday 6 --weekday 7",
    "tidings preferences quiet-hours ID --none",
)
_COLUMNS = ("CATEGORY", "CHANNEL", "APPLIES", "WHY", "QUIET HOURS")

app = typer.Typer(
    help="Preferences: what a user wants to be told, over which channel and when.",
    epilog=examples("tidings preferences get ID", "tidings preferences set ID email off"),
    no_args_is_help=True,
)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The user's id.")]


class Choice(StrEnum):
    """What becomes of a channel."""

    ON = "on"
    OFF = "off"
    DEFAULT = "default"


@app.command("get", epilog=_GET_EXAMPLES)
def get(user_id: _Id, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Show what applies to each category on each channel, and why."""

    async def body() -> None:
        async with preferences_at(address) as preferences:
            _show(await preferences.get(user_id), as_json)

    run(body())


@app.command("set", epilog=_SET_EXAMPLES)
def choose(
    user_id: _Id,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="email, in_app or webhook.")],
    choice: Annotated[Choice, typer.Argument(help="default takes the user's choice back.")],
    category: Annotated[
        str, typer.Option("--category", metavar="NAME", help="Of this category only, not of the channel as a whole.")
    ] = "",
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Switch a channel on or off, as a whole or for one category.

    Exit code 5 if somebody else changes the user's preferences at the same moment: run it again.
    """

    async def body() -> None:
        async with preferences_at(address) as preferences:
            found = await preferences.get(user_id)
            choices = found.categories[category].channels if category else found.channels
            if choice is Choice.DEFAULT:
                choices.pop(channel, None)
            else:
                choices[channel] = choice is Choice.ON
            if category and not choices:
                del found.categories[category]
            field = "categories" if category else "channels"
            _show(await preferences.update(found, [field]), as_json)

    run(body())


@app.command("quiet-hours", epilog=_HOURS_EXAMPLES)
def quiet_hours(
    user_id: _Id,
    start: Annotated[str, typer.Argument(metavar="START", help="Local time, HH:MM.")] = "",
    end: Annotated[
        str, typer.Argument(metavar="END", help="Local time, HH:MM; on the next day unless later than START.")
    ] = "",
    weekdays: Annotated[
        list[int] | None,
        typer.Option("--weekday", metavar="N", help="They begin on it: 1 Monday to 7 Sunday; may be repeated."),
    ] = None,
    time_zone: Annotated[str, typer.Option("--time-zone", metavar="ZONE", help="IANA name; UTC unless given.")] = "",
    none: Annotated[bool, typer.Option("--none", help="No quiet hours any more.")] = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Set when a user is left alone: mail that falls in these hours waits for their end."""
    if none == bool(start and end) or (none and (start or weekdays or time_zone)):
        raise typer.BadParameter("give START and END, or --none alone")

    async def body() -> None:
        wanted = _Preferences(user_id=user_id)
        if not none:
            wanted.quiet_hours.MergeFrom(
                _Preferences.QuietHours(start=start, end=end, weekdays=weekdays or (), time_zone=time_zone)
            )
        async with preferences_at(address) as preferences:
            _show(await preferences.update(wanted, ["quiet_hours"]), as_json)

    run(body())


def _show(found: preferences_pb2.Preferences, as_json: bool) -> None:
    if as_json:
        output.write([output.json_line(found)])
        return
    hours = found.quiet_hours
    output.record(
        [
            ("user", found.user_id),
            ("version", str(found.version)),
            ("updated", output.time(found.update_time)),
            ("quiet hours", _hours(hours) if found.HasField("quiet_hours") else "none"),
        ]
    )
    output.table(_COLUMNS, [_row(one) for one in found.effective])


def _hours(hours: preferences_pb2.Preferences.QuietHours) -> str:
    days = " on weekdays " + ",".join(map(str, hours.weekdays)) if hours.weekdays else ""
    return f"{hours.start} to {hours.end}{days} {hours.time_zone}".rstrip()


def _row(one: preferences_pb2.Preferences.Effective) -> list[str]:
    source = _Preferences.Effective.Source.Name(one.source).lower()
    return [one.category, one.channel, "on" if one.on else "off", source, "wait" if one.quiet_hours else ""]
