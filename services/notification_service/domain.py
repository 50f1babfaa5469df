"""What the service keeps: notifications, each made by one rule from one event, and deliveries, each to one target.

Ids are derived, not drawn: whoever processes an event again makes the same ids, so nothing can be made twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from tidings.notifications.v1 import digests_pb2, in_app_pb2, notifications_pb2, sends_pb2

EMAIL = "email"
IN_APP = "in_app"
WEBHOOK = "webhook"
CHANNELS = (EMAIL, IN_APP, WEBHOOK)
# Those that carry deliveries. What is in-app is there once it is stored.
CARRIERS = (EMAIL, WEBHOOK)

# Why deliveries end: Delivery.end_reason.
NOT_COMPOSED = "NOT_COMPOSED"
REFUSED = "REFUSED"
TRIES_EXHAUSTED = "TRIES_EXHAUSTED"
EXPIRED = "EXPIRED"
TARGET_GONE = "TARGET_GONE"
DISCARDED_BY_HAND = "DISCARDED_BY_HAND"
USER_DELETED = "USER_DELETED"
SEND_CANCELLED = "SEND_CANCELLED"


class State(IntEnum):
    """Delivery.State, as stored."""

    PENDING = notifications_pb2.Delivery.PENDING
    DELIVERED = notifications_pb2.Delivery.DELIVERED
    PARKED = notifications_pb2.Delivery.PARKED
    DISCARDED = notifications_pb2.Delivery.DISCARDED
    CANCELLED = notifications_pb2.Delivery.CANCELLED


class Result(IntEnum):
    """Delivery.Attempt.Outcome, as stored."""

    SUCCEEDED = notifications_pb2.Delivery.Attempt.SUCCEEDED
    FAILED = notifications_pb2.Delivery.Attempt.FAILED
    REFUSED = notifications_pb2.Delivery.Attempt.REFUSED
    UNKNOWN = notifications_pb2.Delivery.Attempt.UNKNOWN


class Operation(IntEnum):
    """Delivery.Operation.Kind, as stored."""

    REPLAYED = notifications_pb2.Delivery.Operation.REPLAYED
    DISCARDED = notifications_pb2.Delivery.Operation.DISCARDED


class Change(IntEnum):
    """UpdateInAppNotificationsRequest.Change."""

    SEEN = in_app_pb2.UpdateInAppNotificationsRequest.SEEN
    READ = in_app_pb2.UpdateInAppNotificationsRequest.READ
    UNREAD = in_app_pb2.UpdateInAppNotificationsRequest.UNREAD
    ARCHIVE = in_app_pb2.UpdateInAppNotificationsRequest.ARCHIVE
    UNARCHIVE = in_app_pb2.UpdateInAppNotificationsRequest.UNARCHIVE


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery to be stored. One without content is parked at once, for the reason in `problem`."""

    id: uuid.UUID
    channel: str
    target: str
    idempotency_key: str
    content: bytes = b""
    problem: str = ""


class DigestState(IntEnum):
    """Digest.State, as stored."""

    OPEN = digests_pb2.Digest.OPEN
    CLOSED = digests_pb2.Digest.CLOSED
    CANCELLED = digests_pb2.Digest.CANCELLED


@dataclass(frozen=True, slots=True)
class Item:
    """A mail that is gathered by the digest of this name instead of being delivered by itself."""

    digest: str
    target: str
    # Its user's.
    locale: str
    # What the digest's template sees of it, as JSON.
    view: str


@dataclass(frozen=True, slots=True)
class Notification:
    """A notification to be stored with its deliveries."""

    id: uuid.UUID
    user_id: uuid.UUID
    event_id: uuid.UUID
    event_position: int
    rule: str
    category: str
    template: str
    channels: tuple[str, ...]
    trace_parent: str
    trace_state: str
    # What it says in the app.
    subject: str = ""
    body: str = ""
    deliveries: tuple[Delivery, ...] = field(default=())
    # What it was rendered with; empty if it was not rendered.
    template_version: str = ""
    time_zone: str = ""
    locale: str = ""
    # Of one that a caller sent; then its event's id is its own.
    send_id: uuid.UUID | None = None
    # Mails that are gathered, and the digest that they go into, of several the first; or the digest that it is the mail
    # of.
    items: tuple[Item, ...] = ()
    digest_id: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Person:
    """A living user as this service's own copy has it."""

    user_id: uuid.UUID
    version: int
    username: str
    email: str
    display_name: str
    locale: str
    time_zone: str
    labels: Mapping[str, str]
    create_time: datetime | None
    update_time: datetime | None


@dataclass(frozen=True, slots=True)
class Order:
    """What a caller asked to be sent, in the hands of who makes its notifications."""

    id: uuid.UUID
    epoch: int
    template: str
    category: str
    channels: Sequence[str]
    params: Mapping[str, Any]
    # To whom: ids in their order or, where these are None, whoever the filter matches.
    user_ids: Sequence[uuid.UUID] | None
    filter: Mapping[str, Any] | None
    # When it was due.
    due_time: datetime
    actor: str
    trace_parent: str
    trace_state: str
    # Everybody up to this user is passed; None is nobody.
    passed: uuid.UUID | None
    # How many unknown ids were met so far.
    unknown: int
    # The position of the user feed as of which the copy of the users was, at least, when the turn began.
    as_of: int


class SendState(IntEnum):
    """Send.State, as stored."""

    SCHEDULED = sends_pb2.Send.SCHEDULED
    SENDING = sends_pb2.Send.SENDING
    SENT = sends_pb2.Send.SENT
    CANCELLED = sends_pb2.Send.CANCELLED
    FAILED = sends_pb2.Send.FAILED


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the user feed is processed, and how many notifications and deliveries that made."""

    log_id: uuid.UUID | None
    resume_token: str | None
    position: int
    notification_position: int
    delivery_position: int
    # Events that an earlier division of the feed has passed: by the shards that it had, up to which position.
    floors: tuple[tuple[int, ...], ...] = ()
    # Without a token: no event before this time is beyond the position.
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """A shard of the user feed, which `owner` alone may store as long as the epoch lasts."""

    owner: uuid.UUID
    shard: int
    of: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Leased:
    """A delivery that this process may attempt now, as attempt `number`; the policy does not count the first
    `tries_before` of them.
    """

    id: uuid.UUID
    number: int
    channel: str
    target: str
    idempotency_key: str
    content: bytes
    create_time: datetime
    trace_parent: str
    trace_state: str
    event_id: uuid.UUID
    tries_before: int = 0
    # Whether the time in which the policy tries is over.
    late: bool = False
    # Who is asked, and whose outage ended the attempt before; names of mail providers.
    provider: str = ""
    failed_provider: str = ""

    @property
    def turn(self) -> int:
        """Which of the policy's tries this is."""
        return self.number - self.tries_before


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended and what that makes of its delivery; `delay` (seconds) is until the next attempt."""

    id: uuid.UUID
    number: int
    result: Result
    code: int
    detail: str
    state: State
    delay: float
    # Why it is parked.
    reason: str = ""
    # Whether it was one of the policy's tries.
    counts: bool = True
    failed_provider: str = ""


def notification_id(event_id: uuid.UUID, rule: str) -> uuid.UUID:
    """The id of what a rule makes of an event."""
    return uuid.uuid5(event_id, rule)


def sent_id(send_id: uuid.UUID, user_id: uuid.UUID) -> uuid.UUID:
    """The id of the notification that a send makes for a user."""
    return uuid.uuid5(send_id, str(user_id))


def delivery_id(notification: uuid.UUID, channel: str, target: str) -> uuid.UUID:
    """The id of a notification's delivery to a target."""
    return uuid.uuid5(notification, f"{channel}:{target}")


def digest_rule(name: str) -> str:
    """What stands for the rule of a digest's notification."""
    return f"digest:{name}"


def digest_id(first: uuid.UUID, name: str, target: str) -> uuid.UUID:
    """The id of the digest that a notification's mail to a target opens."""
    return uuid.uuid5(first, f"digest:{name}:{target}")


def digest_notification_id(digest: uuid.UUID) -> uuid.UUID:
    """The id of what a digest becomes."""
    return uuid.uuid5(digest, "notification")


def stamp(time: datetime | None) -> Timestamp | None:
    """A time as messages have it; None, which leaves a field unset, for none."""
    if time is None:
        return None
    made = Timestamp()
    made.FromDatetime(time)
    return made
