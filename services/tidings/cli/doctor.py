"""`tidings doctor`: asks every service how it is and says in words what is wrong and what to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import typer

from tidings.cli import looks, output
from tidings.cli.access import open_channel
from tidings.cli.exits import ExitCode, run
from tidings.cli.looks import Finding, State
from tidings.cli.options import (
    NOTIFICATIONS_ADDRESS,
    USERS_ADDRESS,
    Json,
    NotificationsAddress,
    UsersAddress,
    examples,
)
from tidings.client import ApiError, Notifications, Users
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

_TIMEOUT = 5.0

# Whoever is behind must have moved after so many seconds.
_SECOND_LOOK = 1.0

# A shard of the feed without news moves with its bookmarks, which are at most 5 min apart.
_LONGEST_QUIET = 330.0

# A due delivery is taken up within seconds.
_LONGEST_DUE = 60.0

_USERS = users_pb2.DESCRIPTOR.services_by_name["UserService"].full_name
_NOTIFICATIONS = notifications_pb2.DESCRIPTOR.services_by_name["NotificationService"].full_name

_ADVICE = {
    grpc.StatusCode.UNAUTHENTICATED: "give a token that the service knows: --token-file or TIDINGS_CLIENT_TOKEN_FILE",
    grpc.StatusCode.PERMISSION_DENIED: "let the service's file of callers allow it, or give another token",
}


_STYLES = {State.OK: "green", State.ATTENTION: "yellow", State.ILL: "bold red"}


_EXAMPLES = examples("tidings doctor", "tidings doctor --json | jq -r 'select(.state != \"ok\").advice'")


def register(group: typer.Typer) -> None:
    """Adds the command."""
    group.command("doctor", epilog=_EXAMPLES)(doctor)


def doctor(
    users_address: UsersAddress = USERS_ADDRESS,
    notifications_address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Say what is wrong and what to do.

    Looks at every service's health, schema, clock and settings, at how far the feed is processed and at the
    deliveries. Exit code 1 if the system is ill.
    """
    run(_doctor(users_address, notifications_address, as_json))


async def _doctor(users_address: str, notifications_address: str, as_json: bool) -> None:
    ill = False
    async with (
        open_channel(users_address, heed_health=False) as users,
        open_channel(notifications_address, heed_health=False) as notifications,
    ):
        async for finding in _findings(users, users_address, notifications, notifications_address):
            ill = ill or finding.state is State.ILL
            if as_json:
                output.write([output.json_line(asdict(finding))])
                continue
            output.styled(f"{finding.state:<9}", _STYLES[finding.state], f"{finding.check}: {finding.message}")
            if finding.advice:
                output.styled(" " * 9, "", f"-> {finding.advice}")
    if ill:
        raise typer.Exit(ExitCode.UNEXPECTED)


async def _findings(
    users: grpc.aio.Channel, users_address: str, notifications: grpc.aio.Channel, notifications_address: str
) -> AsyncIterator[Finding]:
    services = (
        (looks.Service("user service", _USERS, users_address), users),
        (looks.Service("notification service", _NOTIFICATIONS, notifications_address), notifications),
    )
    ready = []
    for service, channel in services:
        seen = await looks.look(service, channel)
        found = [seen] if isinstance(seen, Finding) else list(looks.findings(seen))
        ready.append(found[0].state is State.OK)
        for finding in found:
            yield finding
    directory, inbox = Users(users, timeout=_TIMEOUT), Notifications(notifications, timeout=_TIMEOUT)
    users_ready, notifications_ready = ready
    if users_ready:
        yield await _guarded("feed", _feed(directory))
    if notifications_ready:
        if users_ready:
            yield await _guarded("subscription", _subscription(directory, inbox))
        yield await _guarded("deliveries", _deliveries(inbox))


async def _guarded(check: str, look: Coroutine[Any, Any, Finding]) -> Finding:
    try:
        return await look
    except ApiError as error:
        advice = _ADVICE.get(error.code, "look into the service's log")
        return Finding(check, State.ILL, f"cannot be asked: {error.message}", advice)


async def _feed(users: Users) -> Finding:
    feed = await users.feed()
    if not feed.head_position:
        return Finding("feed", State.OK, "no change yet")
    message = f"positions {feed.earliest_position} to {feed.head_position}, the newest of {output.time(feed.head_time)}"
    return Finding("feed", State.OK, message)


async def _subscription(users: Users, notifications: Notifications) -> Finding:
    inbox, feed = await _both(users, notifications)
    if inbox.log_id and inbox.log_id != feed.log_id:
        message = "the notification service follows the log of another user service"
        advice = "set TIDINGS_NOTIFICATIONS_USERS_ADDRESS right, or let it begin anew with an empty database"
        return Finding("subscription", State.ILL, message, advice)
    if inbox.position > feed.head_position:
        message = f"the notification service is at {inbox.position}, beyond the feed's head {feed.head_position}"
        advice = "the users database was restored to an older state: restore the notifications database to match"
        return Finding("subscription", State.ILL, message, advice)
    behind = feed.head_position - inbox.position
    if not behind:
        return Finding("subscription", State.OK, f"every change is processed, up to {inbox.position}")
    await asyncio.sleep(_SECOND_LOOK)
    later, feed = await _both(users, notifications)
    if len(later.shards) > 1:
        return _shards(inbox, later)
    if later.position == inbox.position:
        message = f"stands still at {later.position}, {feed.head_position - later.position} changes behind"
        advice = "the notification service's log says why it cannot read the feed or store what it reads"
        return Finding("subscription", State.ILL, message, advice)
    behind = max(0, feed.head_position - later.position)
    return Finding("subscription", State.OK, f"catching up: {behind} changes behind, at {later.position}")


def _shards(inbox: notifications_pb2.Inbox, later: notifications_pb2.Inbox) -> Finding:
    """Of a feed that is followed in shards. What one of them has passed says nothing about another."""
    before = {one.index: one.position for one in inbox.shards}
    oldest = datetime.now(UTC).timestamp() - _LONGEST_QUIET
    still = [
        f"{one.index} at {one.position}" + ("" if one.owner else ", which nobody follows")
        for one in later.shards
        if one.position == before.get(one.index)
        and (one.lag_events or not one.owner or one.update_time.ToDatetime(tzinfo=UTC).timestamp() < oldest)
    ]
    if still:
        message = f"of {len(later.shards)} shards some stand still: {'; '.join(still)}"
        advice = "the notification service's log says why it cannot read the feed or store what it reads"
        return Finding("subscription", State.ILL, message, advice)
    message = f"{len(later.shards)} shards are followed, every change is processed up to {later.position}"
    return Finding("subscription", State.OK, message)


async def _both(users: Users, notifications: Notifications) -> tuple[notifications_pb2.Inbox, users_pb2.Feed]:
    # The inbox first: what it has passed is then not beyond the head that follows.
    inbox = await notifications.inbox()
    return inbox, await users.feed()


async def _deliveries(notifications: Notifications) -> Finding:
    inbox = await notifications.inbox()
    counts = f"{inbox.delivered} delivered, {inbox.pending} pending, {inbox.parked} parked, {inbox.discarded} discarded"
    if inbox.HasField("oldest_pending_time"):
        late = (datetime.now(UTC) - inbox.oldest_pending_time.ToDatetime(tzinfo=UTC)).total_seconds()
        if late > _LONGEST_DUE:
            message = f"{counts}; the oldest is overdue by {late:.0f} s"
            advice = "the dispatcher does not keep up or does not run: look into the notification service's log"
            return Finding("deliveries", State.ILL, message, advice)
    if inbox.parked:
        advice = (
            "`tidings deliveries list --state parked` says why; mend the cause, then `tidings deliveries replay "
            "--all-parked`, or `tidings deliveries discard ID` what is not to be sent"
        )
        return Finding("deliveries", State.ATTENTION, counts, advice)
    return Finding("deliveries", State.OK, counts)
