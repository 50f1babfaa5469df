"""Preferences: what a user wants, and what therefore applies to a category on a channel.

A document is what is stored of a user, with only what the user decided:
    {"channels": {"email": false},
     "categories": {"account": {"email": true}},
     "quiet_hours": {"start": "22:00", "end": "07:00", "weekdays": [1, 2, 3, 4, 5], "time_zone": "Europe/Berlin"}}
The most particular decision counts: a category on a channel, then the channel as a whole, then the file's default.
Mandatory categories are on whatever the user decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from enum import Enum
from typing import Any
from zoneinfo import ZoneInfo

from notification_service.categories import Category
from notification_service.quiet_hours import EVERY_DAY, QuietHours

Document = Mapping[str, Any]

_FALLBACK_ZONE = "UTC"


class Source(Enum):
    """Why something applies."""

    DEFAULT = "default"
    CHANNEL = "channel"
    CATEGORY = "category"
    MANDATORY = "mandatory"


@dataclass(frozen=True, slots=True)
class Effective:
    """Whether a category is on for a channel, and why."""

    on: bool
    source: Source

    @property
    def why(self) -> str:
        """The source in words."""
        return _WORDS[self.source]


_WORDS = {
    Source.DEFAULT: "default",
    Source.CHANNEL: "the user's choice for the channel",
    Source.CATEGORY: "the user's choice for the category",
    Source.MANDATORY: "the operator: the category is mandatory",
}


def effective(document: Document | None, category: str, rules: Category, channel: str) -> Effective:
    """What applies to a category, named `category`, on a channel; `document` is None for a user without one."""
    if rules.mandatory:
        return Effective(True, Source.MANDATORY)
    decided = document or {}
    of_category = decided.get("categories", {}).get(category, {}).get(channel)
    if of_category is not None:
        return Effective(bool(of_category), Source.CATEGORY)
    of_channel = decided.get("channels", {}).get(channel)
    if of_channel is not None:
        return Effective(bool(of_channel), Source.CHANNEL)
    return Effective(channel not in rules.off, Source.DEFAULT)


def quiet_hours(document: Document | None, time_zone: str) -> tuple[QuietHours, ZoneInfo] | None:
    """A user's quiet hours and their zone: the document's own, else the user's, else UTC; None if there are none."""
    stored = (document or {}).get("quiet_hours")
    if not stored:
        return None
    weekdays = frozenset(stored.get("weekdays") or EVERY_DAY)
    hours = QuietHours(time.fromisoformat(stored["start"]), time.fromisoformat(stored["end"]), weekdays)
    return hours, zone(stored.get("time_zone") or time_zone)


def zone(name: str) -> ZoneInfo:
    """The zone of an IANA name; UTC for one that is empty or that this machine does not know."""
    try:
        return ZoneInfo(name or _FALLBACK_ZONE)
    except (KeyError, ValueError, OSError):
        return ZoneInfo(_FALLBACK_ZONE)
