"""What the page is told of events, notifications and deliveries: plain objects for JSON, with times as RFC 3339."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from tidings.client import User, UserEvent
from tidings.notifications.v1 import notifications_pb2

View = dict[str, Any]

_FIELDS = ("username", "email", "display_name", "locale", "time_zone")
_Delivery = notifications_pb2.Delivery


def time(stamp: Timestamp) -> str | None:
    """None for a time that is not set."""
    return stamp.ToJsonString() if stamp.seconds or stamp.nanos else None


def trace_id(trace_parent: str) -> str | None:
    """Of a W3C traceparent."""
    parts = trace_parent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else None


def event_row(event: UserEvent) -> View:
    """An event as a line of the list."""
    return {
        "position": event.position,
        "type": UserEvent.Type.Name(event.type),
        "time": time(event.commit_time),
        "user_id": event.user.id,
        "username": event.user.username,
        "email": event.user.email,
        "display_name": event.user.display_name,
        "changed": list(event.changed_fields),
        "actor": event.actor,
        "trace_id": trace_id(event.trace_parent),
    }


def event_detail(event: UserEvent) -> View:
    """All of an event: each field of the user with its value before and after."""
    before = event.previous if event.HasField("previous") else User()
    fields = [
        {"name": name, "before": getattr(before, name), "after": getattr(event.user, name)}
        for name in _FIELDS
        if getattr(before, name) or getattr(event.user, name)
    ]
    fields += [
        {"name": f"labels.{key}", "before": before.labels.get(key, ""), "after": event.user.labels.get(key, "")}
        for key in sorted({*before.labels, *event.user.labels})
    ]
    return {
        **event_row(event),
        "id": event.id,
        "version": event.user.version,
        "fields": fields,
        "delete_time": time(event.user.delete_time),
        "purge_time": time(event.user.purge_time),
        "trace_parent": event.trace_parent,
    }


def notification(one: notifications_pb2.Notification) -> View:
    """A notification."""
    return {
        "id": one.id,
        "position": one.position,
        "user_id": one.user_id,
        "event_id": one.event_id,
        "event_position": one.event_position,
        "rule": one.rule,
        "category": one.category,
        "template": one.template,
        "channels": list(one.channels),
        "subject": one.subject,
        "body": one.body,
        "time": time(one.create_time),
        "trace_id": trace_id(one.trace_parent),
    }


def delivery(one: notifications_pb2.Delivery) -> View:
    """A delivery with every attempt."""
    return {
        "id": one.id,
        "notification_id": one.notification_id,
        "user_id": one.user_id,
        "event_id": one.event_id,
        "channel": one.channel,
        "target": one.target,
        "state": _Delivery.State.Name(one.state),
        "key": one.idempotency_key,
        "attempts": [_attempt(attempt) for attempt in one.attempts],
        "operations": [
            {
                "kind": _Delivery.Operation.Kind.Name(done.kind),
                "actor": done.actor,
                "reason": done.reason,
                "time": time(done.time),
            }
            for done in one.operations
        ],
        "time": time(one.create_time),
        "next_attempt_time": time(one.next_attempt_time),
        "end_time": time(one.end_time),
        "trace_id": trace_id(one.trace_parent),
    }


def _attempt(one: notifications_pb2.Delivery.Attempt) -> View:
    return {
        "number": one.number,
        "outcome": _Delivery.Attempt.Outcome.Name(one.outcome),
        "code": one.code,
        "detail": one.detail,
        "start_time": time(one.start_time),
        "end_time": time(one.end_time),
    }
