"""Checks what a user decides before it is stored: no document that the gate cannot use ever is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import time
from typing import Any
from zoneinfo import ZoneInfo

from notification_service.categories import Categories
from notification_service.domain import CHANNELS
from notification_service.quiet_hours import EVERY_DAY, QuietHours
from servicekit.errors import Violation

FIELDS = ("channels", "categories", "quiet_hours")

_MOST_CATEGORIES = 200
_CATEGORY = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TIME = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*")
_LONGEST_ZONE = 64
# What machines keep beside the zones that have a name everywhere.
_NO_ZONES = frozenset({"localtime", "posixrules", "Factory"})


def violations(changes: Mapping[str, Any], categories: Categories) -> list[Violation]:
    """What is wrong with fields of a document (its keys: the preferences module); an empty field is always right."""
    found = [*_channels("channels", changes.get("channels") or {})]
    named = changes.get("categories") or {}
    if len(named) > _MOST_CATEGORIES:
        found.append(Violation("preferences.categories", f"must be at most {_MOST_CATEGORIES}"))
        return found
    for name, choices in sorted(named.items()):
        found += _category(name, choices, categories)
    if hours := changes.get("quiet_hours"):
        found += _quiet_hours(hours)
    return found


def _channels(path: str, choices: Mapping[str, bool]) -> Iterator[Violation]:
    for channel in sorted(choices):
        if channel not in CHANNELS:
            yield Violation(f"preferences.{path}", f"{channel!r} is not one of {', '.join(CHANNELS)}")


def _category(name: str, choices: Mapping[str, bool], categories: Categories) -> Iterator[Violation]:
    if not _CATEGORY.fullmatch(name):
        yield Violation("preferences.categories", f"{name!r} is no name: 1 to 63 of a-z, 0-9, '.', '_' and '-'")
        return
    path = f"categories.{name}"
    if not choices:
        yield Violation(f"preferences.{path}", "must name a channel")
    yield from _channels(path, choices)
    if categories.of(name).mandatory and not all(choices.values()):
        yield Violation(f"preferences.{path}", "is mandatory and cannot be switched off")


def _quiet_hours(hours: Mapping[str, Any]) -> Iterator[Violation]:
    path = "preferences.quiet_hours"
    sound = True
    for name in ("start", "end"):
        if not _TIME.fullmatch(hours.get(name, "")):
            sound = False
            yield Violation(f"{path}.{name}", "must be a local time, HH:MM")
    weekdays = hours.get("weekdays", [])
    if not EVERY_DAY.issuperset(weekdays) or len(set(weekdays)) != len(weekdays):
        sound = False
        yield Violation(f"{path}.weekdays", "must be of 1 (Monday) to 7 (Sunday), each once")
    if not _is_zone(hours.get("time_zone", "")):
        yield Violation(f"{path}.time_zone", "must be an IANA time zone, such as Europe/Berlin, or empty")
    if sound:
        start, end = time.fromisoformat(hours["start"]), time.fromisoformat(hours["end"])
        try:
            QuietHours(start, end, frozenset(weekdays or EVERY_DAY))
        except ValueError as error:
            yield Violation(path, str(error))


def _is_zone(name: str) -> bool:
    if not name:
        return True
    if len(name) > _LONGEST_ZONE or name in _NO_ZONES or not _ZONE.fullmatch(name):
        return False
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return False
    return True
