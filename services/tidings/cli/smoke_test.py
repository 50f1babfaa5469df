"""`tidings smoke-test`: lets one change go all the way, from a call to the notification that comes of it.

It leaves a deleted user behind, whose address takes no mail.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Annotated, TypeVar

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import (
    NOTIFICATIONS_ADDRESS,
    USERS_ADDRESS,
    NotificationsAddress,
    UsersAddress,
    channel_to,
    examples,
)
from tidings.client import Notifications, UserFeed, Users
from tidings.users.v1 import users_pb2

_POLL = 0.2

_Found = TypeVar("_Found")

_EXAMPLES = examples("tidings smoke-test", "tidings --token-file smoke.token --ca ca.pem smoke-test --timeout 30")

Timeout = Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="What each step may take.")]


def register(group: typer.Typer) -> None:
    """Adds the command."""
    group.command("smoke-test", epilog=_EXAMPLES)(smoke_test)


def smoke_test(
    users: UsersAddress = USERS_ADDRESS,
    notifications: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    timeout: Timeout = 60,
) -> None:
    """Create a user, see its event and its notification, and delete it."""
    run(_smoke_test(users, notifications, timeout))


async def _smoke_test(users_address: str, notifications_address: str, timeout: float) -> None:
    async with (
        channel_to("user service", users_address) as to_users,
        channel_to("notification service", notifications_address) as to_notifications,
    ):
        users = Users(to_users, timeout=timeout)
        name = f"smoke-test-{uuid.uuid4().hex[:12]}"
        made = await users.create(users_pb2.User(username=name, email=f"{name}@example.com"))
        output.write([f"created {name}"])
        try:
            event = await _within(
                timeout, f"the feed has no event of {name}", _event(UserFeed(to_users, user_ids=[made.id]))
            )
            output.write([f"the feed has it at position {event.position}"])
            rule = await _within(
                timeout,
                f"the notification service has made nothing of event {event.position}: `tidings doctor` says more",
                _notification(Notifications(to_notifications, timeout=timeout), event.id),
            )
            output.write([f"the notification service has made of it: {rule}"])
        finally:
            await users.delete(made.id)
        output.write([f"deleted {name}"])


async def _within(timeout: float, otherwise: str, awaited: Awaitable[_Found]) -> _Found:
    try:
        return await asyncio.wait_for(awaited, timeout)
    except TimeoutError:
        raise CommandError(f"{otherwise}, after {timeout:g} s", ExitCode.UNAVAILABLE) from None


async def _event(feed: UserFeed) -> users_pb2.UserEvent:
    async with aclosing(aiter(feed)) as batches:
        async for batch in batches:
            return batch.events[0]
    raise AssertionError("a feed has no end")


async def _notification(notifications: Notifications, event_id: str) -> str:
    while True:
        async for one in notifications.list(event_id=event_id):
            return one.rule
        await asyncio.sleep(_POLL)
