"""What the rules of the run must make of an event: a second implementation, which shares nothing with the service but
how ids are made of names.
"""

from __future__ import annotations

import tomllib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.delivery_faults.evidence import Event

RULES_FILE = Path(__file__).with_name("rules.toml")
SENDER_DOMAIN = "faults.example"

# What each endpoint wants: event types and categories; empty is all.
ENDPOINTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "everything": (frozenset(), frozenset()),
    "births": (frozenset({"CREATED", "UNDELETED"}), frozenset()),
    "account": (frozenset(), frozenset({"account"})),
    "profile": (frozenset({"UPDATED"}), frozenset({"profile"})),
}


class Wanted(NamedTuple):
    """A delivery that must be."""

    id: str
    notification_id: str
    user_id: str
    channel: str
    target: str
    key: str


class Made(NamedTuple):
    """A notification that must be, with its deliveries."""

    id: str
    event: Event
    rule: str
    deliveries: tuple[Wanted, ...]


def rules() -> list[dict[str, Any]]:
    """The rules as the file has them."""
    found: list[dict[str, Any]] = tomllib.loads(RULES_FILE.read_text(encoding="utf-8"))["rules"]
    return found


def made_of(event: Event, rules: list[dict[str, Any]], endpoints: Mapping[str, str]) -> Iterator[Made]:
    """What an event makes; `endpoints` are targets by name."""
    for rule in rules:
        fields = rule.get("changed_fields")
        if event.type not in rule["on"] or (fields and not event.changed_fields.intersection(fields)):
            continue
        identity = str(uuid.uuid5(uuid.UUID(event.id), rule["name"]))
        targets = [("email", address) for address in _addresses(event, rule)]
        if "webhook" in rule["channels"]:
            targets += [("webhook", target) for target in _targets(event, rule, endpoints)]
        wanted = (_wanted(identity, event, channel, target) for channel, target in targets)
        yield Made(identity, event, rule["name"], tuple(wanted))


def _addresses(event: Event, rule: dict[str, Any]) -> list[str]:
    if "email" not in rule["channels"]:
        return []
    named = {"current": event.email, "previous": event.previous}
    found = {named[which].casefold(): named[which] for which in rule.get("recipients", ["current"])[::-1]}
    return [address for address in found.values() if address]


def _targets(event: Event, rule: dict[str, Any], endpoints: Mapping[str, str]) -> list[str]:
    return [
        endpoints[name]
        for name, (types, categories) in ENDPOINTS.items()
        if (not types or event.type in types) and (not categories or rule["category"] in categories)
    ]


def _wanted(notification: str, event: Event, channel: str, target: str) -> Wanted:
    identity = str(uuid.uuid5(uuid.UUID(notification), f"{channel}:{target}"))
    key = f"<{identity}@{SENDER_DOMAIN}>" if channel == "email" else identity
    return Wanted(identity, notification, event.user_id, channel, target, key)
