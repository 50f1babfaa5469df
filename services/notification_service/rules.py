"""Rules: which events become notifications, and what those are made of.

A file has `[[rules]]` tables; `default_rules.toml` is the one that is used unless the operator names another, and
explains every key. An event makes one notification per rule that matches it. Its `[[digests]]` tables say how mails of
rules are gathered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from notification_service.domain import CHANNELS
from servicekit import configfile
from tidings.users.v1 import users_pb2

DEFAULT_FILE = Path(__file__).with_name("default_rules.toml")

EVENT_TYPES = {name: users_pb2.UserEvent.Type.Value(name) for name in ("CREATED", "UPDATED", "DELETED", "UNDELETED")}
_USER_FIELDS = frozenset(users_pb2.User.DESCRIPTOR.fields_by_name)

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


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

    def matches(self, event: users_pb2.UserEvent) -> bool:
        """Whether this rule makes a notification of an event."""
        if event.type not in (EVENT_TYPES[name] for name in self.on):
            return False
        return not self.changed_fields or not self.changed_fields.isdisjoint(event.changed_fields)


def load(path: Path | None) -> tuple[Rule, ...]:
    """The rules of a file, or the default ones."""
    return configfile.read(path or DEFAULT_FILE, "rules", Rule)
