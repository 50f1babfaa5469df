"""From a send and one of its recipients to a notification: over which channels, and in what words.

Pure, as `compose` is: the same send, user, templates and endpoints make the same ids and contents. A template sees
`user`, `name`, `recipient`, `locale` and `params`, and nothing of an event, for there is none.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from notification_service import domain, samples
from notification_service.channels import Addressee, Draft, Says, Writer
from notification_service.compose import Composer, addressed
from notification_service.domain import EMAIL, IN_APP, Notification, Order, Person
from notification_service.rules import SENT
from notification_service.templates import Loaded, Rendered, RenderError
from servicekit import logs

log = logs.get(__name__)

# Why a recipient gets none: what is counted.
NO_ADDRESS = "no_address"
NOT_COMPOSED = "not_composed"

_TIMES = ("create_time", "update_time", "delete_time", "purge_time")


class SkippedError(Exception):
    """A recipient for whom there is nothing to make; its text is the reason."""


def says(channels: Sequence[str], writers: Mapping[str, Writer]) -> Says:
    """What channels need of a template."""
    return max(Says.TEXT if one == IN_APP else writers[one].says for one in channels)


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


def notification(order: Order, person: Person, templates: Loaded, composer: Composer) -> Notification:
    """What a send makes for one user. Raises SkippedError."""
    identity = domain.sent_id(order.id, person.user_id)
    channels = [one for one in order.channels if one != EMAIL or person.email]
    if not channels:
        raise SkippedError(NO_ADDRESS)
    needs = says(channels, composer.writers)
    view = {"user": _user_view(person), "params": order.params}
    link = composer.unsubscribe(person.user_id, order.category, person.email) if person.email else ""
    context = addressed(view, "current", link)

    def render(seen: Mapping[str, Any]) -> Rendered:
        return templates.render(order.template, seen, locale=person.locale, html=needs is Says.HTML)

    @cache
    def say(which: str) -> Rendered:
        return render(context)

    subject = body = version = locale = ""
    if needs:
        version = templates.version
        locale = templates.locale(order.template, person.locale, needs is Says.HTML)
    if IN_APP in channels:
        try:
            said = say("current")
            # A link that speaks for its reader is for mails alone.
            if link and link in said.text:
                said = render(addressed(view, "current"))
            subject, body = said.subject, said.text
        except RenderError as error:
            log.error("in-app notification dropped", send_id=str(order.id), reason=str(error))
            channels.remove(IN_APP)
    if not channels:
        raise SkippedError(NOT_COMPOSED)
    draft = Draft(
        identity,
        order.category,
        SENT,
        [Addressee("current", context["name"], person.email, link)],
        say,
        lambda: _payload(order, identity, view["user"]),
    )
    return Notification(
        id=identity,
        user_id=person.user_id,
        # No event has made it: its own id keeps what would be unique of an event.
        event_id=identity,
        # A deletion that the copy of the users does not know of cancels what is pending; one before does not, for its
        # user has come back since.
        event_position=order.as_of,
        rule="",
        category=order.category,
        template=order.template,
        template_version=version,
        time_zone=person.time_zone,
        locale=locale,
        channels=tuple(channels),
        subject=subject,
        body=body,
        trace_parent=order.trace_parent,
        trace_state=order.trace_state,
        deliveries=tuple(one for name in channels if name != IN_APP for one in composer.writers[name].compose(draft)),
        send_id=order.id,
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
