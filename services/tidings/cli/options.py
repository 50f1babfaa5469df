"""The options that several commands share, and the services behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

import grpc
import grpc.aio
import typer

from tidings.cli.access import open_channel
from tidings.cli.exits import CommandError, ExitCode
from tidings.client import ApiError, Notifications, Preferences, Users

USERS_ADDRESS = "127.0.0.1:50051"
NOTIFICATIONS_ADDRESS = "127.0.0.1:50052"

UsersAddress = Annotated[
    str,
    typer.Option("--users", metavar="ADDR", envvar="TIDINGS_CLIENT_USERS_ADDRESS", help="Address of the user service."),
]
NotificationsAddress = Annotated[
    str,
    typer.Option(
        "--notifications",
        metavar="ADDR",
        envvar="TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS",
        help="Address of the notification service.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
Limit = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Show at most N.")]
All = Annotated[bool, typer.Option("--all", help="Show all, whatever --limit says.")]

DEFAULT_LIMIT = 50

_Value = TypeVar("_Value")


def examples(*lines: str) -> str:
    """Examples for the end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def parsed_labels(pairs: Iterable[str] | None) -> dict[str, str]:
    """Labels of the values of --label."""
    labels: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--label")
        if labels.setdefault(key, value) != value:
            raise typer.BadParameter(f"{key!r} has two values", param_hint="--label")
    return labels


@asynccontextmanager
async def channel_to(service: str, address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel; that the service cannot be reached is said with its name and address."""
    async with open_channel(address) as channel:
        try:
            yield channel
        except ApiError as error:
            if error.is_temporary:
                message = f"the {service} at {address} is not available: {error.message}"
                raise CommandError(message, ExitCode.UNAVAILABLE) from error
            raise


@asynccontextmanager
async def users_at(address: str) -> AsyncIterator[Users]:
    """The user service."""
    async with channel_to("user service", address) as channel:
        yield Users(channel)


@asynccontextmanager
async def notifications_at(address: str) -> AsyncIterator[Notifications]:
    """The notification service."""
    async with channel_to("notification service", address) as channel:
        yield Notifications(channel)


@asynccontextmanager
async def preferences_at(address: str) -> AsyncIterator[Preferences]:
    """The notification service's preferences and suppressed addresses."""
    async with channel_to("notification service", address) as channel:
        yield Preferences(channel)
