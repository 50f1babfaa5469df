"""From an event to its notifications: which rules match, who is told over which channel, and in what words.

Pure: the same event, rules, templates and endpoints make the same ids and contents. What cannot be rendered does not
stop the event: its delivery is made without content and says why, and an in-app notification leaves that channel.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from functools import cache, partial
from typing import Any

from notification_service import domain, views
from notification_service.channels import Addressee, Draft, Says, Writer
from notification_service.domain import EMAIL, IN_APP, Item, Notification
from notification_service.rules import Digest, Rule
from notification_service.templates import Need, Rendered, RenderError, Templates
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
        needs = [Need(rule.name, rule.template, says is Says.HTML) for rule, says in said if says]
        return needs + [Need(domain.digest_rule(one.name), one.template, True) for one in self.digests.values()]

    def check(self) -> None:
        """Raises InvalidConfigError, with a line per problem, if a rule's template cannot be used."""
        self.templates.check(self.needs())

    def compose(self, event: users_pb2.UserEvent) -> list[Notification]:
        """What an event becomes; nothing, if no rule matches it."""
        matching = [rule for rule in self.rules if rule.matches(event)]
        if not matching:
            return []
        view = _view(event)
        return [self._notification(rule, event, view) for rule in matching]

    def _says(self, rule: Rule) -> Says:
        # Of a mail that is gathered its subject is.
        texts = (IN_APP, EMAIL) if rule.digest else (IN_APP,)
        return max(Says.TEXT if one in texts else self.writers[one].says for one in rule.channels)

    def _notification(self, rule: Rule, event: users_pb2.UserEvent, view: dict[str, Any]) -> Notification:
        event_id, user_id = uuid.UUID(event.id), uuid.UUID(event.user.id)
        notification_id = domain.notification_id(event_id, rule.name)
        channels, subject, body = rule.channels, "", ""
        templates, version, locale = self.templates.current, "", ""
        says = self._says(rule)
        link = partial(self.unsubscribe, user_id, rule.category)
        addressees = {which: _addressee(view, which, link) for which in {"current", *map(str, rule.recipients)}}

        def render(which: str, url: str) -> Rendered:
            return templates.render(
                rule.template, addressed(view, which, url), locale=event.user.locale, html=says is Says.HTML
            )

        @cache
        def say(which: str) -> Rendered:
            return render(which, addressees[which].unsubscribe_url)

        if says:
            version, locale = templates.version, templates.locale(rule.template, event.user.locale, says is Says.HTML)
        if IN_APP in channels:
            try:
                said = say("current")
                # A link that speaks for its reader is for mails alone.
                if (url := addressees["current"].unsubscribe_url) and url in said.text:
                    said = render("current", "")
                subject, body = said.subject, said.text
            except RenderError as error:
                log.error("in-app notification dropped", rule=rule.name, event_id=event.id, reason=str(error))
                channels = tuple(channel for channel in channels if channel != IN_APP)
        draft = Draft(
            notification_id,
            rule.category,
            view["event"]["type"],
            [addressees[which] for which in rule.recipients],
            say,
            lambda: _payload(rule, notification_id, event, view),
        )
        sent = [name for name in channels if name != IN_APP and not (rule.digest and name == EMAIL)]
        return Notification(
            id=notification_id,
            user_id=user_id,
            event_id=event_id,
            event_position=event.position,
            rule=rule.name,
            category=rule.category,
            template=rule.template,
            template_version=version,
            time_zone=event.user.time_zone,
            locale=locale,
            channels=channels,
            subject=subject,
            body=body,
            trace_parent=event.trace_parent,
            trace_state=event.trace_state,
            deliveries=tuple(one for name in sent for one in self.writers[name].compose(draft)),
            items=tuple(_items(rule, addressees, view, say)),
        )


def _view(event: users_pb2.UserEvent) -> dict[str, Any]:
    """An event as templates see it, but for whom it is said to."""
    return {
        "user": _user_view(event.user),
        "previous": _user_view(event.previous) if event.HasField("previous") else None,
        "event": {
            "type": users_pb2.UserEvent.Type.Name(event.type),
            "time": event.commit_time.ToDatetime(tzinfo=UTC),
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
        view[name] = getattr(user, name).ToDatetime(tzinfo=UTC) if user.HasField(name) else None  # type: ignore[arg-type]
    return view


def addressed(view: Mapping[str, Any], which: str, unsubscribe_url: str = "") -> dict[str, Any]:
    """The view for one recipient, the `current` or the `previous` address."""
    user = view["previous" if which == "previous" else "user"] or {}
    name = user.get("display_name") or user.get("username") or ""
    recipient = {"address": user.get("email", ""), "which": which}
    return {**view, "name": name, "recipient": recipient, "unsubscribe_url": unsubscribe_url}


def _items(
    rule: Rule, addressees: Mapping[str, Addressee], view: dict[str, Any], say: Callable[[str], Rendered]
) -> Iterator[Item]:
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
    rule: Rule, notification_id: uuid.UUID, event: users_pb2.UserEvent, view: dict[str, Any]
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
