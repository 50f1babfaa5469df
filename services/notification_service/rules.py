"""Rules: which events become notifications, and what those are made of.

A file has `[[rules]]` tables and, for what is gathered, `[[digests]]` tables; `default_rules.toml` is the one that is
used unless the operator names another, and explains every key. An event makes one notification per rule that matches
it. Of a rule with a digest the mails are gathered: all that come for a user and an address while a window is open go
out as one mail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from notification_service.domain import CHANNELS, EMAIL
from servicekit import configfile
from tidings.users.v1 import users_pb2

DEFAULT_FILE = Path(__file__).with_name("default_rules.toml")

EVENT_TYPES = {name: users_pb2.UserEvent.Type.Value(name) for name in ("CREATED", "UPDATED", "DELETED", "UNDELETED")}
# What webhook endpoints may want to hear of: those, and what callers send.
SENT = "SENT"
HEARD = (*EVENT_TYPES, SENT)
_USER_FIELDS = frozenset(users_pb2.User.DESCRIPTOR.fields_by_name)

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]

_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORTEST, _LONGEST = timedelta(minutes=1), timedelta(days=7)
_CLOCK = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")

ChannelName = Annotated[str, configfile.one_of(CHANNELS)]


class Rule(configfile.Entry):
    """One rule; the fields are the keys of its table."""

    name: _Name
    on: tuple[str, ...] = Field(min_length=1)
    changed_fields: frozenset[str] = frozenset()
    template: _Name
    category: _Name
    channels: tuple[ChannelName, ...] = Field(min_length=1)
    recipients: tuple[Literal["current", "previous"], ...] = Field(("current",), min_length=1)
    digest: _Name | None = None

    @field_validator("on")
    @classmethod
    def _known_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in types if name not in EVENT_TYPES]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not an event type, these are: {', '.join(EVENT_TYPES)}")
        return types

    @field_validator("changed_fields")
    @classmethod
    def _known_fields(cls, fields: frozenset[str]) -> frozenset[str]:
        unknown = sorted(fields - _USER_FIELDS)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not a field of User")
        return fields

    @field_validator("channels", "recipients")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("names one twice")
        return names

    @model_validator(mode="after")
    def _has_mails_to_gather(self) -> Self:
        if self.digest is not None and EMAIL not in self.channels:
            raise ValueError("digest: gathers mails, but email is none of the channels")
        return self

    def is_about(self, event: users_pb2.UserEvent) -> bool:
        """Whether the event is of a type that this rule is on."""
        return event.type in (EVENT_TYPES[name] for name in self.on)

    def concerns(self, event: users_pb2.UserEvent) -> bool:
        """Whether the event changed what this rule looks at."""
        return not self.changed_fields or not self.changed_fields.isdisjoint(event.changed_fields)

    def matches(self, event: users_pb2.UserEvent) -> bool:
        """Whether this rule makes a notification of an event."""
        return self.is_about(event) and self.concerns(event)


class Digest(configfile.Entry):
    """How mails are gathered; the fields are the keys of its table."""

    name: _Name
    # From the first item on; zero only if `at` is set.
    window: timedelta = timedelta()
    # A local time of the user, in whole minutes: it closes the window instead.
    at: time | None = None
    template: _Name = "digest"
    category: _Name
    # As soon as it has so many items it closes.
    most: int = Field(100, ge=1, le=1000)

    @field_validator("window", mode="before")
    @classmethod
    def _duration(cls, given: Any) -> timedelta:
        found = _DURATION.fullmatch(given.strip()) if isinstance(given, str) else None
        window = timedelta(seconds=int(found[1]) * _UNITS[found[2]]) if found else timedelta()
        if not _SHORTEST <= window <= _LONGEST:
            raise ValueError('must be a duration of 1 minute to 7 days, such as "15m", "1h" or "7d"')
        return window

    @field_validator("at", mode="before")
    @classmethod
    def _local_time(cls, given: Any) -> time:
        if not isinstance(given, str) or not _CLOCK.fullmatch(given.strip()):
            raise ValueError('must be a local time such as "08:00"')
        return time.fromisoformat(given.strip())

    @model_validator(mode="after")
    def _closes(self) -> Self:
        if not self.window and self.at is None:
            raise ValueError("window or at is required")
        return self


@dataclass(frozen=True, slots=True)
class Rules:
    """What a file says; the digests by their names."""

    rules: tuple[Rule, ...]
    digests: Mapping[str, Digest]


def load(path: Path | None) -> tuple[Rule, ...]:
    """The rules of a file, or the default ones. Raises InvalidConfigError."""
    return read(path).rules


def read(path: Path | None) -> Rules:
    """The rules and digests of a file, or the default ones. Raises InvalidConfigError."""
    path = path or DEFAULT_FILE
    rules = configfile.read(path, "rules", Rule, beside=("digests",))
    digests = {one.name: one for one in configfile.read(path, "digests", Digest, beside=("rules",))}
    problems = []
    for rule in rules:
        if rule.digest is None:
            continue
        digest = digests.get(rule.digest)
        if digest is None:
            problems.append(f"{path}: rule {rule.name!r}: digest: there is no digest {rule.digest!r}")
        elif digest.category != rule.category:
            problems.append(
                f"{path}: rule {rule.name!r}: digest: {digest.name!r} is of category {digest.category!r}, "
                f"the rule of {rule.category!r}"
            )
    if problems:
        raise configfile.InvalidConfigError("\n".join(problems))
    return Rules(rules, digests)
