"""From an event to its notifications: which rules match, who is told over which channel, and in what words.

Pure: the same event, rules, templates and endpoints make the same ids and contents. What cannot be rendered does not
stop the event: its delivery is made without content and says why, and an in-app notification leaves that channel.
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
from notification_service.channels import Addressee, Draft, Says, Writer
from notification_service.domain import EMAIL, IN_APP, Item, Notification
from notification_service.rules import Digest, Rule
from notification_service.templates import Asked, Loaded, Need, Rendered, RenderError, Templates
from servicekit import logs
from tidings.users.v1 import users_pb2

log = logs.get(__name__)

_TIMES = ("create_time", "update_time", "delete_time", "purge_time")


def no_link(user_id: uuid.UUID, category: str, address: str) -> str:
    """The link of mails that have none."""
    return ""


@dataclass(frozen=True, slots=True)
class _Begun:
    """An event and a rule that matches it."""

    event: users_pb2.UserEvent
    rule: Rule
    view: Mapping[str, Any]
    says: Says
    # By `current` and `previous`.
    addressees: Mapping[str, Addressee]

    @property
    def is_shown(self) -> bool:
        """Whether it is for the app."""
        return IN_APP in self.rule.channels

    def told(self) -> Iterator[str]:
        """Whom something is said to."""
        if self.says:
            yield from dict.fromkeys((*(("current",) if self.is_shown else ()), *self.rule.recipients))

    def asked(self, which: str, url: str) -> Asked:
        """What is said to one of them, with the link that switches it off."""
        context = addressed(self.view, which, url)
        return Asked(self.rule.template, context, self.says is Says.HTML, self.event.user.locale)


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
        return self.compose_all([event])

    def compose_all(self, events: Sequence[users_pb2.UserEvent]) -> list[Notification]:
        """What events become, one after the other. All that they say is rendered at once."""
        templates = self.templates.current
        begun: list[_Begun] = []
        for event in events:
            if matching := [rule for rule in self.rules if rule.matches(event)]:
                view = _view(event)
                begun += (self._begun(event, rule, view) for rule in matching)
        said = _render(
            templates,
            {
                (number, which): one.asked(which, one.addressees[which].unsubscribe_url)
                for number, one in enumerate(begun)
                for which in one.told()
            },
        )
        # A link that speaks for its reader is for mails alone.
        shown = _render(
            templates,
            {
                (number, "current"): one.asked("current", "")
                for number, one in enumerate(begun)
                if one.is_shown and _has(said[number, "current"], one.addressees["current"].unsubscribe_url)
            },
        )
        shown = {**said, **shown}
        return [
            self._notification(one, templates, partial(_say, said, number), partial(_say, shown, number))
            for number, one in enumerate(begun)
        ]

    def _begun(self, event: users_pb2.UserEvent, rule: Rule, view: Mapping[str, Any]) -> _Begun:
        link = partial(self.unsubscribe, uuid.UUID(event.user.id), rule.category)
        addressees = {which: _addressee(view, which, link) for which in {"current", *map(str, rule.recipients)}}
        return _Begun(event, rule, view, self._says(rule), addressees)

    def _says(self, rule: Rule) -> Says:
        # Of a mail that is gathered its subject is.
        texts = (IN_APP, EMAIL) if rule.digest else (IN_APP,)
        return max(Says.TEXT if one in texts else self.writers[one].says for one in rule.channels)

    def _notification(
        self, begun: _Begun, templates: Loaded, say: Callable[[str], Rendered], show: Callable[[str], Rendered]
    ) -> Notification:
        event, rule, view = begun.event, begun.rule, begun.view
        event_id = uuid.UUID(event.id)
        notification_id = domain.notification_id(event_id, rule.name)
        channels, subject, body = rule.channels, "", ""
        version, locale = "", ""
        if begun.says:
            html = begun.says is Says.HTML
            version, locale = templates.version, templates.locale(rule.template, event.user.locale, html)
        if begun.is_shown:
            try:
                shown = show("current")
                subject, body = shown.subject, shown.text
            except RenderError as error:
                log.error("in-app notification dropped", rule=rule.name, event_id=event.id, reason=str(error))
                channels = tuple(channel for channel in channels if channel != IN_APP)
        draft = Draft(
            notification_id,
            rule.category,
            view["event"]["type"],
            [begun.addressees[which] for which in rule.recipients],
            say,
            lambda: _payload(rule, notification_id, event, view),
        )
        sent = [name for name in channels if name != IN_APP and not (rule.digest and name == EMAIL)]
        return Notification(
            id=notification_id,
            user_id=uuid.UUID(event.user.id),
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
            items=tuple(_items(rule, begun.addressees, view, say)),
        )


_Said = Mapping[tuple[int, str], Rendered | RenderError]


def _render(templates: Loaded, asked: Mapping[tuple[int, str], Asked]) -> _Said:
    return dict(zip(asked, templates.render_all(list(asked.values())), strict=True))


def _say(said: _Said, number: int, which: str) -> Rendered:
    rendered = said[number, which]
    if isinstance(rendered, RenderError):
        raise rendered
    return rendered


def _has(said: Rendered | RenderError, url: str) -> bool:
    return bool(url) and isinstance(said, Rendered) and url in said.text


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


def _items(
    rule: Rule, addressees: Mapping[str, Addressee], view: Mapping[str, Any], say: Callable[[str], Rendered]
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
