"""DigestService as callers see it: checks a request, asks the store or has a digest closed, and answers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from notification_service import errors
from notification_service.api import requests
from notification_service.domain import DigestState
from notification_service.store import digests
from servicekit import logs
from servicekit.database import Pool
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import digests_pb2, digests_pb2_grpc

log = logs.get(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]

# Each comes with the ids of its items.
_LARGEST_PAGE = 100
# For how long a flush waits for somebody else who closes the same digest, and looks how often; seconds.
_PATIENCE, _PAUSE = 5.0, 0.05


class DigestService(digests_pb2_grpc.DigestServiceServicer):
    """The servicer. `flush` closes a digest now if it is open."""

    def __init__(self, pool: Pool, flush: Callable[[uuid.UUID], Awaitable[None]]) -> None:
        self._pool = pool
        self._flush = flush

    async def ListDigests(
        self, request: digests_pb2.ListDigestsRequest, context: _Context
    ) -> digests_pb2.ListDigestsResponse:
        asked = request.filter
        filters = requests.ids(user_id=asked.user_id, notification_id=asked.notification_id)
        violations = []
        if "\0" in asked.name:
            violations.append(Violation("filter.name", "must not have a NUL character"))
        if asked.state and asked.state not in {int(state) for state in DigestState}:
            violations.append(Violation("filter.state", "is no state of a digest"))
        if violations:
            raise invalid(*violations)
        if asked.name:
            filters["name"] = asked.name
        if asked.state:
            filters["state"] = int(asked.state)
        size, selection, before = requests.page(request, filters)
        size = min(size, _LARGEST_PAGE)
        async with requests.connection(self._pool) as connection:
            found = await digests.page(connection, filters, before, size + 1)
        return digests_pb2.ListDigestsResponse(
            digests=[digest for _, digest in found[:size]],
            next_page_token=requests.next_page([position for position, _ in found], size, selection),
        )

    async def GetDigest(self, request: digests_pb2.GetDigestRequest, context: _Context) -> digests_pb2.Digest:
        return await self._found(requests.one_id(request.id))

    async def FlushDigest(self, request: digests_pb2.FlushDigestRequest, context: _Context) -> digests_pb2.Digest:
        identity = requests.one_id(request.id)
        before = await self._found(identity)
        if before.state == digests_pb2.Digest.OPEN:
            loop = asyncio.get_running_loop()
            until = loop.time() + _PATIENCE
            while True:
                with requests.reaching():
                    await self._flush(identity)
                before = await self._found(identity)
                # Somebody else closes it at this moment, or has died of that.
                if before.state != digests_pb2.Digest.OPEN or loop.time() > until:
                    break
                await asyncio.sleep(_PAUSE)
            if before.state == digests_pb2.Digest.CLOSED:
                items = len(before.item_notification_ids)
                log.info("a digest was flushed by a call", digest_id=str(identity), items=items)
        if before.state == digests_pb2.Digest.CANCELLED:
            raise errors.digest_cancelled(before.id, before.end_reason)
        return before

    async def _found(self, identity: uuid.UUID) -> digests_pb2.Digest:
        async with requests.connection(self._pool) as connection:
            found = await digests.find(connection, identity)
        if found is None:
            raise errors.unknown_digest(str(identity))
        return found
