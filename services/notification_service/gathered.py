"""From a digest whose window is over to its notification: one mail that says all that was gathered.

Pure: the same digest, items, templates and writer make the same ids and contents. What cannot be read makes a delivery
without content that says why, as what cannot be rendered does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

from notification_service import domain, views
from notification_service.channels import Addressee, Says
from notification_service.domain import EMAIL, Notification
from notification_service.plans import Plan
from notification_service.windows import Window

# What an item has of its own, in a template; the rest, of the last item, is the digest's, too.
_OF_ITEM = ("event", "previous", "subject", "rule")


def context(items: Sequence[Mapping[str, Any]], window: Mapping[str, Any], unsubscribe_url: str = "") -> dict[str, Any]:
    """What a digest's template sees: the items in their order, each with what its rule's template saw, its subject and
    its rule; `digest` (name, open_time); its link; and of the last item its user, name and recipient.
    """
    last = {key: value for key, value in items[-1].items() if key not in _OF_ITEM}
    return {**last, "items": list(items), "digest": dict(window), "unsubscribe_url": unsubscribe_url}


def plan(window: Window, items: Sequence[str], template: str, unsubscribe_url: str = "") -> Plan:
    """The notification that a digest becomes; `items` are the views that were gathered, at least one, and the link is
    empty if its mail has none.
    """
    seen: dict[str, Any] = {}
    problem = ""
    try:
        digest = {"name": window.name, "open_time": window.open_time.astimezone(UTC)}
        seen = context([views.decode(one) for one in items], digest, unsubscribe_url)
        name = seen["name"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Another release has stored it.
        name, problem = "", f"what was gathered cannot be read: {type(error).__name__}"
    return Plan(
        Notification(
            id=domain.digest_notification_id(window.id),
            user_id=window.user_id,
            event_id=window.event_id,
            event_position=window.event_position,
            rule=domain.digest_rule(window.name),
            category=window.category,
            template=template,
            time_zone=window.time_zone,
            channels=(EMAIL,),
            trace_parent=window.trace_parent,
            trace_state=window.trace_state,
            digest_id=window.id,
        ),
        Says.HTML,
        window.locale,
        # Who the items were for is in their views; to the writer there is one.
        {"current": Addressee("current", name, window.target, unsubscribe_url)},
        lambda *_: seen,
        dict,
        problem=problem,
    )
