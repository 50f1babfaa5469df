"""InAppService as callers see it: checks a request, asks the store, and answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import grpc.aio

from notification_service.api import requests
from notification_service.domain import Change
from notification_service.store import in_app
from notification_service.store.in_app import Wanted
from servicekit.database import Pool
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import in_app_pb2, in_app_pb2_grpc, notifications_pb2

_Context = grpc.aio.ServicerContext[Any, Any]

_MOST_IDS = 1000
_LIST = in_app_pb2.ListInAppNotificationsRequest
_ARCHIVED: dict[int, bool | None] = {_LIST.ARCHIVED_UNSPECIFIED: False, _LIST.ONLY: True, _LIST.INCLUDED: None}


class InAppService(in_app_pb2_grpc.InAppServiceServicer):
    """The servicer. `changed` is called when counts may have become others."""

    def __init__(self, pool: Pool, changed: Callable[[], None]) -> None:
        self._pool = pool
        self._changed = changed

    async def ListInAppNotifications(
        self, request: in_app_pb2.ListInAppNotificationsRequest, context: _Context
    ) -> in_app_pb2.ListInAppNotificationsResponse:
        user_id, violations = _user(request.user_id)
        asked = request.filter
        if asked.archived not in _ARCHIVED:
            violations.append(Violation("filter.archived", "is none of those that there are"))
        if "\0" in asked.category:
            violations.append(Violation("filter.category", "must not have a NUL character"))
        if violations:
            raise invalid(*violations)
        wanted = Wanted(asked.unread, asked.unseen, _ARCHIVED[asked.archived], asked.category)
        selected = {"user_id": user_id, "wanted": wanted}
        size, selection, before = requests.page(request, selected)
        async with requests.connection(self._pool) as connection:
            found = await in_app.list_notifications(connection, user_id, wanted, before, size + 1)
        return in_app_pb2.ListInAppNotificationsResponse(
            notifications=found[:size],
            next_page_token=requests.next_page([one.position for one in found], size, selection),
        )

    async def GetInAppCounts(
        self, request: in_app_pb2.GetInAppCountsRequest, context: _Context
    ) -> notifications_pb2.InAppCounts:
        user_id, violations = _user(request.user_id)
        if violations:
            raise invalid(*violations)
        async with requests.connection(self._pool) as connection:
            return (await in_app.counts(connection, user_id)).counts

    async def UpdateInAppNotifications(
        self, request: in_app_pb2.UpdateInAppNotificationsRequest, context: _Context
    ) -> in_app_pb2.UpdateInAppNotificationsResponse:
        user_id, change, ids = _change(request)
        try:
            async with requests.connection(self._pool) as connection:
                if ids:
                    changed = await in_app.change(connection, user_id, change, ids)
                else:
                    changed = await in_app.change_all(connection, user_id, change, request.up_to_position)
                counted = await in_app.counts(connection, user_id)
        finally:
            # Also of a call that fails after some of its transactions.
            self._changed()
        return in_app_pb2.UpdateInAppNotificationsResponse(changed=changed, counts=counted.counts)


def _user(text: str) -> tuple[uuid.UUID, list[Violation]]:
    """The user, and what is wrong with it."""
    try:
        return uuid.UUID(text), []
    except ValueError:
        return uuid.UUID(int=0), [Violation("user_id", "must be a UUID" if text else "is required")]


def _change(request: in_app_pb2.UpdateInAppNotificationsRequest) -> tuple[uuid.UUID, Change, list[uuid.UUID]]:
    """The user, the change, and the ids of a request, each once: none if it goes up to a position."""
    user_id, violations = _user(request.user_id)
    if request.change not in {int(one) for one in Change}:
        violations.append(Violation("change", "must be one of SEEN, READ, UNREAD, ARCHIVE, UNARCHIVE"))
    if bool(request.ids) == bool(request.up_to_position):
        violations.append(Violation("ids", "exactly one of ids and up_to_position is required"))
    if len(request.ids) > _MOST_IDS:
        violations.append(Violation("ids", f"must be at most {_MOST_IDS}"))
    ids = requests.each_id(request.ids[:_MOST_IDS], "ids", violations)
    if request.up_to_position >= 1 << 63:
        violations.append(Violation("up_to_position", "is no position"))
    if violations:
        raise invalid(*violations)
    return user_id, Change(request.change), list(dict.fromkeys(ids))
