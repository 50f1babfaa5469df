"""From a send and its recipients to notifications: over which channels, and in what words.

Pure, as `compose` is: the same send, user, templates and endpoints make the same ids and contents. A template sees
`user`, `name`, `recipient`, `locale` and `params`, and nothing of an event, for there is none.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from notification_service import domain, samples
from notification_service.assemble import assemble
from notification_service.channels import Addressee, Says, Writer
from notification_service.compose import Composer, addressed
from notification_service.domain import EMAIL, Notification, Order, Person
from notification_service.plans import Plan, says
from notification_service.rules import SENT
from notification_service.templates import Loaded, RenderError

# Why a recipient gets none: what is counted.
NO_ADDRESS = "no_address"
NOT_COMPOSED = "not_composed"

_TIMES = ("create_time", "update_time", "delete_time", "purge_time")


def try_out(
    template: str, channels: Sequence[str], params: Mapping[str, Any], templates: Loaded, writers: Mapping[str, Writer]
) -> None:
    """Renders a template for a made-up user, each of its translations. Takes its time. Raises RenderError."""
    needs = says(channels, writers)
    if not needs:
        return
    user = samples.view({}, "CREATED")[0]["user"]
    context = addressed({"user": user, "params": params}, "current")
    for locale in ("", *templates.files.locales(template)):
        said = templates.render(template, context, locale=locale, html=needs is Says.HTML)
        if said.html_problem:
            raise RenderError(said.html_problem)


def notifications(
    order: Order, people: Iterable[Person], templates: Loaded, composer: Composer
) -> tuple[list[Notification], Counter[str]]:
    """What a send makes for some of its recipients, all that it says rendered at once; and how many get none, by the
    reasons. Takes its time.
    """
    plans, skipped = [], Counter[str]()
    for person in people:
        channels = tuple(one for one in order.channels if one != EMAIL or person.email)
        if channels:
            plans.append(_plan(order, person, channels, composer))
        else:
            skipped[NO_ADDRESS] += 1
    made = []
    for one in assemble(plans, templates, composer.writers):
        if one.channels:
            made.append(one)
        else:
            skipped[NOT_COMPOSED] += 1
    return made, skipped


def _plan(order: Order, person: Person, channels: tuple[str, ...], composer: Composer) -> Plan:
    identity = domain.sent_id(order.id, person.user_id)
    view = {"user": _user_view(person), "params": order.params}
    name = addressed(view, "current")["name"]
    link = composer.unsubscribe(person.user_id, order.category, person.email) if person.email else ""
    return Plan(
        Notification(
            id=identity,
            user_id=person.user_id,
            # No event has made it: its own id keeps what would be unique of an event.
            event_id=identity,
            # A deletion that the copy of the users does not know of cancels what is pending; one before does not, for
            # its user has come back since.
            event_position=order.as_of,
            rule="",
            category=order.category,
            template=order.template,
            time_zone=person.time_zone,
            channels=channels,
            trace_parent=order.trace_parent,
            trace_state=order.trace_state,
            send_id=order.id,
        ),
        says(channels, composer.writers),
        person.locale,
        {"current": Addressee("current", name, person.email, link)},
        partial(addressed, view),
        partial(_payload, order, identity, view["user"]),
        kind=SENT,
    )


def _user_view(person: Person) -> dict[str, Any]:
    """A user as templates see it, of the same shape as that of an event."""
    return {
        "id": str(person.user_id),
        "username": person.username,
        "email": person.email,
        "display_name": person.display_name,
        "locale": person.locale,
        "time_zone": person.time_zone,
        "labels": dict(person.labels),
        "version": person.version,
        "create_time": person.create_time,
        "update_time": person.update_time,
        "delete_time": None,
        "purge_time": None,
    }


def _payload(order: Order, identity: uuid.UUID, user: Mapping[str, Any]) -> dict[str, Any]:
    times = {name: _json_time(user[name]) for name in _TIMES}
    return {
        "type": f"notification.{SENT.lower()}",
        "timestamp": _json_time(order.due_time),
        "data": {
            "notification": {"id": str(identity), "rule": "", "category": order.category},
            "send": {
                "id": str(order.id),
                "template": order.template,
                "actor": order.actor,
                "params": order.params,
            },
            "event": None,
            "user": {**user, "labels": dict(sorted(user["labels"].items())), **times},
            "previous": None,
        },
    }


def _json_time(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")
