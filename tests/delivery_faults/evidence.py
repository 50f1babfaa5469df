"""What a run left: plain rows of the databases, what the servers got, what was done. All times are those of one clock,
seconds since the epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.bad import Received


class Event(NamedTuple):
    """A change as the feed has it. `email` and `previous` are the addresses after and before it."""

    position: int
    id: str
    type: str
    user_id: str
    version: int
    email: str
    previous: str
    changed_fields: frozenset[str]


class Notification(NamedTuple):
    """A row of its table."""

    id: str
    position: int
    event_id: str
    event_position: int
    user_id: str
    rule: str


class Delivery(NamedTuple):
    """A row of its table; `end` is 0 until it has ended."""

    id: str
    position: int
    notification_id: str
    user_id: str
    channel: str
    target: str
    state: str
    end_reason: str
    end: float
    key: str
    tries: int


class Attempt(NamedTuple):
    """A row of its table; `end` is 0 if its outcome was never recorded."""

    delivery_id: str
    number: int
    outcome: str
    code: int
    start: float
    end: float


class Operation(NamedTuple):
    """What was done to a parked delivery by hand."""

    delivery_id: str
    kind: str
    time: float


KILLED, PAUSED, AWAY = "killed", "paused", "away"


class Deed(NamedTuple):
    """What was done to the system: `what` says that a replica was killed or paused, or that the database was away.
    `hit` says whether it met work in flight, `until` when it was over.
    """

    kind: str
    what: str
    at: float
    until: float
    hit: bool


class Change(NamedTuple):
    """A user as a writer was answered."""

    user_id: str
    version: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the service was told: of one attempt, and of a lease, in seconds; and which channels' parked deliveries hold
    back later ones.
    """

    timeout: float
    lease: float
    parked_holds: frozenset[str]


@dataclass(slots=True)
class Evidence:
    """All of it. `endpoints` are the webhook targets, by name; `troubles` is how often servers met each."""

    bounds: Bounds
    endpoints: dict[str, str] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    notifications: list[Notification] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    deeds: list[Deed] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    notes: dict[str, object] = field(default_factory=dict)


def keep(evidence: Evidence, path: Path) -> None:
    """Writes it as JSON lines, `["Kind", field, ...]`, for people to look at; of contents a digest."""
    rows: list[tuple[Any, ...]] = [
        (type(row).__name__, *(sorted(part) if isinstance(part, frozenset) else part for part in row))
        for rows_ in (
            evidence.events, evidence.notifications, evidence.deliveries, evidence.attempts, evidence.operations,
            evidence.deeds,
        )
        for row in rows_
    ]  # fmt: skip
    rows += [
        (
            "Received", one.server, one.key, one.target, hashlib.sha256(one.content).hexdigest()[:16], one.peer, one.at,
            one.accepted, one.answer_time,
        )
        for one in evidence.received
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
