"""From an event to its notifications: which rules match, who is told over which channel, and by which template.

Pure: the same event, rules, templates and endpoints make the same ids and contents.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from notification_service import domain, views
from notification_service.assemble import assemble
from notification_service.channels import Addressee, Says, Writer
from notification_service.domain import Item, Notification
from notification_service.plans import Plan, Say, says
from notification_service.rules import Digest, Rule
from notification_service.templates import Need, RenderError, Templates
from servicekit import logs
from tidings.users.v1 import users_pb2

log = logs.get(__name__)

_TIMES = ("create_time", "update_time", "delete_time", "purge_time")


def no_link(user_id: uuid.UUID, category: str, address: str) -> str:
    """The link of mails that have none."""
    return ""


@dataclass(frozen=True, slots=True)
class Composer:
    """All that decides what an event becomes; `writers` by the names of their channels, all but the in-app one, and
    `digests` by their own, all that the rules name.
    """

    rules: Sequence[Rule]
    templates: Templates
    writers: Mapping[str, Writer]
    # The link by which a user's mails of a category to an address are switched off; empty if there is none.
    unsubscribe: Callable[[uuid.UUID, str, str], str] = no_link
    digests: Mapping[str, Digest] = field(default_factory=dict)

    def needs(self) -> list[Need]:
        """What the rules and digests need of the templates."""
        said = [(rule, self._says(rule)) for rule in self.rules]
        needs = [Need(rule.name, rule.template, need is Says.HTML) for rule, need in said if need]
        return needs + [Need(domain.digest_rule(one.name), one.template, True) for one in self.digests.values()]

    def check(self) -> None:
        """Raises InvalidConfigError, with a line per problem, if a rule's template cannot be used."""
        self.templates.check(self.needs())

    def compose(self, events: Sequence[users_pb2.UserEvent]) -> list[Notification]:
        """What events become, one after the other; nothing, if no rule matches. All they say is rendered at once."""
        plans: list[Plan] = []
        for event in events:
            if matching := [rule for rule in self.rules if rule.matches(event)]:
                view = _view(event)
                plans += (self._plan(event, rule, view) for rule in matching)
        return assemble(plans, self.templates.current, self.writers)

    def _says(self, rule: Rule) -> Says:
        return says(rule.channels, self.writers, gathered=rule.digest is not None)

    def _plan(self, event: users_pb2.UserEvent, rule: Rule, view: Mapping[str, Any]) -> Plan:
        user_id, event_id = uuid.UUID(event.user.id), uuid.UUID(event.id)
        identity = domain.notification_id(event_id, rule.name)
        link = partial(self.unsubscribe, user_id, rule.category)
        addressees = {which: _addressee(view, which, link) for which in {"current", *map(str, rule.recipients)}}
        return Plan(
            Notification(
                id=identity,
                user_id=user_id,
                event_id=event_id,
                event_position=event.position,
                rule=rule.name,
                category=rule.category,
                template=rule.template,
                time_zone=event.user.time_zone,
                channels=rule.channels,
                trace_parent=event.trace_parent,
                trace_state=event.trace_state,
            ),
            self._says(rule),
            event.user.locale,
            addressees,
            partial(addressed, view),
            partial(_payload, rule, identity, event, view),
            recipients=rule.recipients,
            kind=view["event"]["type"],
            items=partial(_items, rule, addressees, view) if rule.digest else None,
        )


def _view(event: users_pb2.UserEvent) -> dict[str, Any]:
    """An event as templates see it, but for whom it is said to."""
    return {
        "user": _user_view(event.user),
        "previous": _user_view(event.previous) if event.HasField("previous") else None,
        "event": {
            "type": users_pb2.UserEvent.Type.Name(event.type),
            "time": _time(event.commit_time),
            "position": event.position,
            "changed_fields": list(event.changed_fields),
            "actor": event.actor,
        },
    }


def _user_view(user: users_pb2.User) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": user.id,
        "username": user.username,
        "email": user.email,
        "display_name": user.display_name,
        "locale": user.locale,
        "time_zone": user.time_zone,
        "labels": dict(user.labels),
        "version": user.version,
    }
    for name in _TIMES:
        view[name] = _time(getattr(user, name)) if user.HasField(name) else None  # type: ignore[arg-type]
    return view


def _time(stamp: Timestamp) -> datetime:
    return _datetime(stamp.seconds, stamp.nanos)


# Most times of an event are its own, and events of one commit share it.
@lru_cache(maxsize=1000)
def _datetime(seconds: int, nanos: int) -> datetime:
    return Timestamp(seconds=seconds, nanos=nanos).ToDatetime(tzinfo=UTC)


def addressed(view: Mapping[str, Any], which: str, unsubscribe_url: str = "") -> dict[str, Any]:
    """The view for one recipient, the `current` or the `previous` address."""
    user = view["previous" if which == "previous" else "user"] or {}
    name = user.get("display_name") or user.get("username") or ""
    recipient = {"address": user.get("email", ""), "which": which}
    return {**view, "name": name, "recipient": recipient, "unsubscribe_url": unsubscribe_url}


def _items(rule: Rule, addressees: Mapping[str, Addressee], view: Mapping[str, Any], say: Say) -> Iterator[Item]:
    """The mails of a rule that are gathered, one for each address."""
    told: set[str] = set()
    for which in rule.recipients:
        address = addressees[which].email
        if rule.digest is None or not address or address.casefold() in told:
            continue
        told.add(address.casefold())
        try:
            subject = say(which).subject
        except RenderError as error:
            # Not for this is it left out of its digest.
            log.error("an item of a digest has no subject", rule=rule.name, reason=str(error))
            subject = ""
        # The link is the digest's.
        shown = addressed(view, which) | {"subject": subject, "rule": rule.name}
        yield Item(rule.digest, address, view["user"]["locale"], views.encode(shown))


def _addressee(view: Mapping[str, Any], which: str, link: Callable[[str], str]) -> Addressee:
    context = addressed(view, which)
    address = context["recipient"]["address"]
    return Addressee(which, context["name"], address, link(address) if address else "")


def _payload(
    rule: Rule, notification_id: uuid.UUID, event: users_pb2.UserEvent, view: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "type": f"user.{view['event']['type'].lower()}",
        "timestamp": event.commit_time.ToJsonString(),
        "data": {
            "notification": {"id": str(notification_id), "rule": rule.name, "category": rule.category},
            "event": {
                "id": event.id,
                "position": event.position,
                "changed_fields": view["event"]["changed_fields"],
                "actor": event.actor,
            },
            "user": _user_json(event.user, view["user"]),
            "previous": _user_json(event.previous, view["previous"]) if view["previous"] else None,
        },
    }


def _user_json(user: users_pb2.User, view: dict[str, Any]) -> dict[str, Any]:
    times = {field: getattr(user, field).ToJsonString() if view[field] else None for field in _TIMES}
    return view | {"labels": dict(sorted(view["labels"].items()))} | times
