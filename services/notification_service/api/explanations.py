"""ExplainDelivery: gathers what is known of an event, a send or a notification, and has it explained."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc.aio
from google.protobuf.json_format import MessageToDict

from notification_service import errors, event_search, explain
from notification_service.api import requests
from notification_service.categories import Categories
from notification_service.domain import EMAIL, sent_id
from notification_service.event_search import Found
from notification_service.explain import Facts, Sending
from notification_service.rules import Rule
from notification_service.store import audience, outlook, reads, sends, standing
from servicekit.database import Connection, Pool
from servicekit.errors import Violation, invalid
from tidings.client import shard_of
from tidings.notifications.v1 import notifications_pb2, sends_pb2

_SEARCH_TIMEOUT = 5.0
_MOST = 1000
_END = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains what this replica finds in the database, by its files. `away` and `disabled` as explain.Facts has it."""

    pool: Pool
    users: grpc.aio.Channel
    rules: Sequence[Rule]
    categories: Categories
    away: Callable[[str, str], str]
    disabled: Callable[[], Collection[str]]

    async def explain(
        self, request: notifications_pb2.ExplainDeliveryRequest
    ) -> notifications_pb2.ExplainDeliveryResponse:
        """Answers a request. Raises UNKNOWN_NOTIFICATION for a notification that is not there, or not this user's."""
        field, subject, user_id = _asked(request)
        if field == "send_id" and user_id is not None:
            return await self._of_send(subject, user_id)
        filters = {"event_id" if field == "event_id" else "id": subject}
        async with requests.connection(self.pool) as connection:
            notifications = await reads.list_notifications(connection, filters, _END, _MOST)
        notifications = [one for one in notifications if user_id is None or one.user_id == str(user_id)][::-1]
        if field == "notification_id":
            if not notifications:
                raise errors.unknown_subject(field, subject, request.user_id)
            user_id = uuid.UUID(notifications[0].user_id)
            if notifications[0].send_id:
                return await self._of_send(uuid.UUID(notifications[0].send_id), user_id)
        if user_id is None:  # an event without a user is refused before
            raise RuntimeError("nobody to explain it for")
        event_id = uuid.UUID(notifications[0].event_id) if notifications else subject
        found = await event_search.find(self.users, user_id, event_id, timeout=_SEARCH_TIMEOUT)
        return await self._explained(notifications, user_id, found, whole=field == "event_id")

    async def _of_send(self, send_id: uuid.UUID, user_id: uuid.UUID) -> notifications_pb2.ExplainDeliveryResponse:
        async with requests.connection(self.pool) as connection:
            send = await sends.find(connection, send_id)
            if send is None:
                raise errors.unknown_send(str(send_id), "send_id")
            made = await reads.list_notifications(connection, {"id": sent_id(send_id, user_id)}, _END, 1)
            sending = Sending(send, "MADE", "it made a notification")
            if not made:
                sending = Sending(send, *await _unsent(connection, send, send_id, user_id))
        return await self._explained(made, user_id, Found(), whole=False, sending=sending)

    async def _explained(
        self,
        notifications: list[notifications_pb2.Notification],
        user_id: uuid.UUID,
        found: Found,
        *,
        whole: bool,
        sending: Sending | None = None,
    ) -> notifications_pb2.ExplainDeliveryResponse:
        ids = [uuid.UUID(one.id) for one in notifications]
        deliveries = []
        async with requests.connection(self.pool) as connection:
            for identity in ids:
                listed = await reads.list_deliveries(connection, {"notification_id": identity}, _END, _MOST)
                deliveries += [one.delivery for one in listed[::-1]]
            circumstances = await outlook.find(connection, ids) if ids else {}
            lowest, shards = await standing.places(connection)
        facts = Facts(
            found=found,
            processed=shards.get(shard_of(str(user_id), len(shards)), lowest) if shards else lowest,
            rules=self.rules,
            categories=self.categories,
            notifications=notifications,
            deliveries=deliveries,
            circumstances=circumstances,
            away=self.away,
            disabled=self.disabled(),
            now=datetime.now(UTC),
            whole=whole,
            sending=sending,
        )
        return notifications_pb2.ExplainDeliveryResponse(steps=explain.steps(facts))


async def _unsent(
    connection: Connection, send: sends_pb2.Send, send_id: uuid.UUID, user_id: uuid.UUID
) -> tuple[str, str]:
    """Why a send made no notification for a user: a verdict, and what it means."""
    to, state = send.recipients, send.state
    if to.HasField("user_ids") and str(user_id) not in to.user_ids.ids:
        return "NOT_NAMED", "the user is none of those that it names"
    if not await sends.has_passed(connection, send_id, user_id):
        if state == sends_pb2.Send.CANCELLED:
            return "CANCELLED", "it was cancelled before it came to the user"
        if state == sends_pb2.Send.FAILED:
            return "FAILED", f"it failed before it came to the user: {send.failure}"
        due = f"{send.send_time.ToDatetime(tzinfo=UTC):%Y-%m-%d %H:%M:%S} UTC"
        return "WAITING", f"it has not come to the user yet; it is due since or at {due}"
    people, deleted = await audience.of_ids(connection, [user_id])
    if deleted:
        return "DELETED", "the user is deleted"
    if not people:
        return "UNKNOWN", "there is no such user"
    if to.HasField("filter"):
        conditions = MessageToDict(to.filter, preserving_proto_field_name=True)
        if not await audience.does_match(connection, conditions, user_id):
            return "NOT_MATCHED", "its filter does not match the user as they are now"
    if not people[0].email and set(send.channels) == {EMAIL}:
        return "NO_ADDRESS", "the user has no address"
    if send.counts.not_composed:
        return "NOT_COMPOSED", "the template could not be rendered for the user, if they were a recipient then"
    if to.HasField("filter"):
        return "NOT_MATCHED", "its filter matches the user as they are now, and did not when it came to them"
    return "UNKNOWN", "there was no such user yet when it came to them"


def _asked(request: notifications_pb2.ExplainDeliveryRequest) -> tuple[str, uuid.UUID, uuid.UUID | None]:
    """What is asked about: the field that names it, its id, and the user's."""
    field = request.WhichOneof("subject")
    if field is None:
        raise invalid(Violation("subject", "is required: event_id, notification_id or send_id"))
    violations, ids = [], {}
    for name in (field, "user_id"):
        text = getattr(request, name)
        if not text and name == "user_id":
            if field != "notification_id":
                violations.append(Violation("user_id", f"is required with {field}"))
            continue
        try:
            ids[name] = uuid.UUID(text)
        except ValueError:
            violations.append(Violation(name, "must be a UUID"))
    if violations:
        raise invalid(*violations)
    return field, ids[field], ids.get("user_id")
