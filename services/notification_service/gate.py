"""The gate: whether a delivery that is due may be sent now, must wait or must never be sent.

It is asked at every attempt, so what changed while a delivery waited counts. A delivery is never dropped without a
reason, and quiet hours only defer.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any

from notification_service import preferences
from notification_service.categories import Categories
from notification_service.domain import WEBHOOK
from notification_service.quiet_hours import quiet_until

# The reason of a suppression that does not stop mandatory categories: who unsubscribes still gets those.
_UNSUBSCRIBED = "UNSUBSCRIBED"


class Reason(IntEnum):
    """Why a delivery is deferred or cancelled, as stored; the name is its stable text."""

    SUPPRESSED = 1
    SWITCHED_OFF = 2
    QUIET_HOURS = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A delivery that is due, with all that the verdict needs."""

    user_id: uuid.UUID
    category: str
    channel: str
    target: str
    # IANA name; empty if the user has none.
    time_zone: str
    # preferences.document; None for a user who decided nothing.
    document: Mapping[str, Any] | None
    # Why the target is suppressed; empty if it is not.
    suppressed: str


@dataclass(frozen=True, slots=True)
class Send:
    """It may be sent now."""


@dataclass(frozen=True, slots=True)
class Defer:
    """It waits, and is asked about again at `until` (UTC)."""

    until: datetime
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """It is never sent."""

    reason: Reason
    detail: str


def decide(candidate: Candidate, categories: Categories, now: datetime) -> Send | Defer | Cancel:
    """The verdict about a delivery at `now` (aware)."""
    rules = categories.of(candidate.category)
    if candidate.suppressed and not (rules.mandatory and candidate.suppressed == _UNSUBSCRIBED):
        return Cancel(Reason.SUPPRESSED, f"the address is suppressed: {candidate.suppressed}")
    applies = preferences.effective(candidate.document, candidate.category, rules, candidate.channel)
    if not applies.on:
        what = f"{candidate.category} on {candidate.channel}"
        return Cancel(Reason.SWITCHED_OFF, f"{what} is off by {applies.why}")
    # A webhook's receiver is a machine: nobody is woken.
    if rules.waits and candidate.channel != WEBHOOK:
        quiet = preferences.quiet_hours(candidate.document, candidate.time_zone)
        until = quiet_until(*quiet, now) if quiet else None
        if quiet and until:
            local = until.astimezone(quiet[1])
            return Defer(until, Reason.QUIET_HOURS, f"quiet hours until {local:%Y-%m-%d %H:%M} {quiet[1].key}")
    return Send()
