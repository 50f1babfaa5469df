"""What an operator can do: send parked deliveries again, or give them up, with a reason that is kept with each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import grpc.aio

from servicekit import logs
from tidings.client import ApiError, Notifications

log = logs.get(__name__)

Kind = Literal["replay", "discard"]

MOST_IDS = 1000
LONGEST_REASON = 500
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class InvalidOrderError(Exception):
    """What was asked cannot be done; the message says why."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to do with which deliveries, and why."""

    kind: Kind
    ids: tuple[str, ...]
    reason: str


def parse(kind: Kind, body: Any) -> Order:
    """Reads `{"ids": [...], "reason": "..."}`. Raises InvalidOrderError."""
    if not isinstance(body, dict) or set(body) != {"ids", "reason"}:
        raise InvalidOrderError("the body must be an object with ids and reason")
    ids, reason = body["ids"], body["reason"]
    if not isinstance(ids, list) or not 1 <= len(ids) <= MOST_IDS:
        raise InvalidOrderError(f"ids: must be a list of 1 to {MOST_IDS}")
    if not all(isinstance(one, str) and _ID.fullmatch(one) for one in ids):
        raise InvalidOrderError("ids: must be ids of deliveries")
    if not isinstance(reason, str) or not 1 <= len(reason.strip()) <= LONGEST_REASON:
        raise InvalidOrderError(f"reason: must be a text of 1 to {LONGEST_REASON} characters")
    return Order(kind, tuple(dict.fromkeys(ids)), reason.strip())


async def carry_out(channel: grpc.aio.Channel, order: Order) -> int:
    """Does it to all of them, which must be parked, or to none; returns how many. Raises ApiError."""
    notifications = Notifications(channel)
    act = {"replay": notifications.replay, "discard": notifications.discard}[order.kind]
    try:
        done = await act(order.ids, reason=order.reason)
    except ApiError as error:
        log.warning("refused", action=order.kind, asked=len(order.ids), error=f"{error.reason}: {error.message}")
        raise
    log.info("done", action=order.kind, asked=len(order.ids), done=done)
    return done
