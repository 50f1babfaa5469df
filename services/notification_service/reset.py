"""Sets the inbox's cursor to another place of the user feed: for an operator, when the feed refuses the one it has.

The new place is asked of the feed, which gives a token for it. The cursor is moved under its lock and only if it is
still where it was when the operator was asked; a service that runs sees it and goes on from there. A feed that is
followed in shards is then one again until the replicas, within seconds, divide it from there on. Nothing is told twice:
what is processed again makes the same ids, and those that are known are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import Literal

import grpc.aio

from notification_service.domain import Cursor
from notification_service.store import feed
from servicekit.database import Connection
from tidings.client import ApiError, FeedError, UserFeed, Users

Start = Literal["earliest", "now"] | datetime

_TIMEOUT = 10.0


class ResetError(Exception):
    """The cursor is not moved; the message says why."""


def start(text: str) -> Start:
    """What `--to` says."""
    if text == "earliest":
        return "earliest"
    if text == "now":
        return "now"
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise argparse.ArgumentTypeError("must be earliest, now, or a time with its zone")
    return time


async def reset(connection: Connection, users: grpc.aio.Channel, to: Start, confirm: Callable[[str], bool]) -> Cursor:
    """Moves the cursor if `confirm` agrees to what that means. Returns the new one. Raises ResetError, or what the
    database says.
    """
    before = await feed.read_place(connection)
    try:
        async with asyncio.timeout(_TIMEOUT):
            after, time = await _place(before, users, to)
    except (ApiError, FeedError) as error:
        raise ResetError(f"the user service says: {error}") from error
    except TimeoutError:
        raise ResetError(f"the user service has not answered within {_TIMEOUT:g} s") from None
    if not confirm("\n".join(effects(before, after))):
        raise ResetError("nothing is changed: answer with y, or give --yes")
    locked = await feed.lock_place(connection)
    if _where(locked) != _where(before):
        await connection.execute("ROLLBACK")
        raise ResetError(f"nothing is changed: meanwhile the cursor was moved to {locked.position}")
    after = replace(locked, log_id=after.log_id, resume_token=after.resume_token, position=after.position)
    await feed.reset(connection, after, time)
    return after


def _where(cursor: Cursor) -> tuple[object, ...]:
    return cursor.log_id, cursor.position, cursor.resume_token


async def _place(before: Cursor, users: grpc.aio.Channel, to: Start) -> tuple[Cursor, datetime | None]:
    """Where the feed begins then, and a time at which it begins there or earlier; none if only the earliest is known.
    Its first message is a bookmark with a token.
    """
    log_id = uuid.UUID((await Users(users, timeout=_TIMEOUT).feed()).log_id)
    async with aclosing(aiter(UserFeed(users, start=to, progress=True))) as batches:
        first = await anext(batches)
    if first.events:
        raise ResetError("the user service does not speak the feed's protocol: the first message is no bookmark")
    after = replace(before, log_id=log_id, resume_token=first.resume_token, position=first.position)
    if to == "earliest" or first.head_time is None:
        return after, None
    return after, first.head_time if to == "now" else min(to, first.head_time)


def effects(before: Cursor, after: Cursor) -> list[str]:
    """What moving the cursor means, line by line."""
    was = (
        f"The cursor is at position {before.position} of log {before.log_id}" if before.log_id else "There is no cursor"
    )
    lines = [f"{was}; it would be at position {after.position} of log {after.log_id}."]
    if before.log_id and before.log_id != after.log_id:
        lines.append("That is another log. All its changes from there on make notifications, whatever was told before.")
    elif after.position < before.position:
        lines.append(
            f"Changes {after.position + 1} to {before.position} are processed again. What they have made is known by "
            "its id and not made again; changes that were not there before, after a restore, make notifications."
        )
    elif after.position > before.position:
        lines.append(f"Changes {before.position + 1} to {after.position} make no notifications here, now or later.")
    else:
        lines.append("No change is processed again, and none is left out.")
    return lines


def asked(text: str) -> bool:
    """Shows what is about to be done and asks for it."""
    print(text)
    print("Go on? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
