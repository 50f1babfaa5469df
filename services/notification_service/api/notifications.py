"""NotificationService as callers see it: checks a request, asks the reads, the streams or what changes parked
deliveries, and answers.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from notification_service import tokens, watch
from notification_service.api import requests
from notification_service.api.explanations import Explainer
from notification_service.domain import Operation, State
from notification_service.store import parked, reads, standing
from notification_service.watch import Streams
from servicekit import callers, logs
from servicekit.database import Pool
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc

log = logs.get(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
_ChangeRequest = notifications_pb2.ReplayDeliveriesRequest | notifications_pb2.DiscardDeliveriesRequest

_DEFAULT_BOOKMARK_INTERVAL = 10.0
_MOST_IDS = 1000
_LONGEST_REASON = 500


class NotificationService(notifications_pb2_grpc.NotificationServiceServicer):
    """The servicer. `replayed` is called when deliveries are to be tried again."""

    def __init__(self, pool: Pool, streams: Streams, explainer: Explainer, replayed: Callable[[], None]) -> None:
        self._pool = pool
        self._explainer = explainer
        self._streams = streams
        self._replayed = replayed

    async def ListNotifications(
        self, request: notifications_pb2.ListNotificationsRequest, context: _Context
    ) -> notifications_pb2.ListNotificationsResponse:
        asked = request.filter
        filters = requests.ids(
            user_id=asked.user_id, event_id=asked.event_id, send_id=asked.send_id, digest_id=asked.digest_id
        )
        if asked.category:
            filters["category"] = asked.category
        size, selection, before = requests.page(request, filters)
        async with requests.connection(self._pool) as connection:
            found = await reads.list_notifications(connection, filters, before, size + 1)
        return notifications_pb2.ListNotificationsResponse(
            notifications=found[:size],
            next_page_token=requests.next_page([one.position for one in found], size, selection),
        )

    async def ListDeliveries(
        self, request: notifications_pb2.ListDeliveriesRequest, context: _Context
    ) -> notifications_pb2.ListDeliveriesResponse:
        asked = request.filter
        filters = _filters(asked)
        if asked.state:
            if asked.state not in {int(state) for state in State}:
                raise invalid(Violation("filter.state", "is no state of a delivery"))
            filters["state"] = int(asked.state)
        size, selection, before = requests.page(request, filters)
        async with requests.connection(self._pool) as connection:
            found = await reads.list_deliveries(connection, filters, before, size + 1)
        return notifications_pb2.ListDeliveriesResponse(
            deliveries=[one.delivery for one in found[:size]],
            next_page_token=requests.next_page([one.position for one in found], size, selection),
        )

    async def GetInbox(self, request: notifications_pb2.GetInboxRequest, context: _Context) -> notifications_pb2.Inbox:
        async with requests.connection(self._pool) as connection:
            return await standing.inbox_state(connection)

    async def ExplainDelivery(
        self, request: notifications_pb2.ExplainDeliveryRequest, context: _Context
    ) -> notifications_pb2.ExplainDeliveryResponse:
        return await self._explainer.explain(request)

    async def WatchNotifications(
        self, request: notifications_pb2.WatchNotificationsRequest, context: _Context
    ) -> AsyncIterator[notifications_pb2.WatchNotificationsResponse]:
        async for message in self._streams.stream(_watch_request(request), callers.name_of(context)):
            yield message

    async def ReplayDeliveries(
        self, request: notifications_pb2.ReplayDeliveriesRequest, context: _Context
    ) -> notifications_pb2.ReplayDeliveriesResponse:
        changed = await self._change(Operation.REPLAYED, request, context)
        self._replayed()
        return notifications_pb2.ReplayDeliveriesResponse(replayed=changed)

    async def DiscardDeliveries(
        self, request: notifications_pb2.DiscardDeliveriesRequest, context: _Context
    ) -> notifications_pb2.DiscardDeliveriesResponse:
        changed = await self._change(Operation.DISCARDED, request, context)
        return notifications_pb2.DiscardDeliveriesResponse(discarded=changed)

    async def _change(self, operation: Operation, request: _ChangeRequest, context: _Context) -> int:
        ids, filters = _which(request)
        actor = callers.name_of(context)
        async with requests.connection(self._pool) as connection:
            if ids:
                changed = await parked.change(connection, operation, ids, actor=actor, reason=request.reason)
            else:
                changed = await parked.change_all(connection, operation, filters, actor=actor, reason=request.reason)
        # The reason, which may name somebody, is kept with the delivery only.
        log.info("parked deliveries changed by hand", operation=operation.name, deliveries=changed)
        return changed


def _filters(
    asked: notifications_pb2.ListDeliveriesRequest.Filter
    | notifications_pb2.ReplayDeliveriesRequest.Filter
    | notifications_pb2.DiscardDeliveriesRequest.Filter,
) -> dict[str, Any]:
    """What a filter of deliveries selects, by column; the state aside."""
    filters = requests.ids(user_id=asked.user_id, notification_id=asked.notification_id)
    if asked.channel:
        filters["channel"] = asked.channel
    return filters


def _which(request: _ChangeRequest) -> tuple[list[uuid.UUID], dict[str, Any]]:
    """The ids of a request, each once, or, if there are none, its filter."""
    violations = []
    if len(request.reason) > _LONGEST_REASON:
        violations.append(Violation("reason", f"must be at most {_LONGEST_REASON} characters"))
    if "\0" in request.reason:
        violations.append(Violation("reason", "must not have a NUL character"))
    if bool(request.ids) == request.HasField("filter"):
        violations.append(Violation("ids", "exactly one of ids and filter is required"))
    if len(request.ids) > _MOST_IDS:
        violations.append(Violation("ids", f"must be at most {_MOST_IDS}"))
    ids = requests.each_id(request.ids[:_MOST_IDS], "ids", violations)
    if violations:
        raise invalid(*violations)
    return list(dict.fromkeys(ids)), _filters(request.filter)


def _watch_request(request: notifications_pb2.WatchNotificationsRequest) -> watch.Request:
    start = request.WhichOneof("start")
    if start is None:
        raise invalid(Violation("start", "is required: one of resume_token, earliest, now"))
    user_id = None
    if request.user_id:
        try:
            user_id = uuid.UUID(request.user_id)
        except ValueError:
            raise invalid(Violation("user_id", "must be a UUID")) from None
    interval = _DEFAULT_BOOKMARK_INTERVAL
    if request.HasField("bookmark_interval"):
        interval = request.bookmark_interval.ToTimedelta().total_seconds()
    if not 1 <= interval <= 300:
        raise invalid(Violation("bookmark_interval", "must be 1 s to 5 min"))
    selection = tokens.selection_hash("WatchNotifications", str(user_id or ""))
    return watch.Request(
        start=tokens.decode_resume(request.resume_token, selection)
        if start == "resume_token"
        else "now"
        if start == "now"
        else "earliest",
        user_id=user_id,
        selection=selection,
        bookmark_interval=interval,
    )
