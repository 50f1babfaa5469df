"""Digests: mails that are gathered, and go out as one."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc.aio

from tidings.client.unary import TIMEOUT, answer, pages
from tidings.notifications.v1 import digests_pb2, digests_pb2_grpc

_PAGE_SIZE = 100


class Digests:
    """Calls DigestService. `timeout` bounds each call, in seconds. Every method raises ApiError."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = digests_pb2_grpc.DigestServiceStub(channel)
        self._timeout = timeout

    async def list(
        self,
        *,
        user_id: str = "",
        name: str = "",
        notification_id: str = "",
        state: digests_pb2.Digest.State.ValueType = digests_pb2.Digest.STATE_UNSPECIFIED,
        page_size: int = _PAGE_SIZE,
    ) -> AsyncGenerator[digests_pb2.Digest, None]:
        """Digests, open and closed, the newest first; pages are fetched as they are needed."""
        request = digests_pb2.ListDigestsRequest(page_size=page_size)
        if user_id or name or notification_id or state:
            request.filter.user_id = user_id
            request.filter.name = name
            request.filter.notification_id = notification_id
            request.filter.state = state
        async for page in pages(self._stub.ListDigests, request, self._timeout):
            for digest in page.digests:
                yield digest

    async def get(self, identity: str) -> digests_pb2.Digest:
        """One digest; UNKNOWN_DIGEST if there is none."""
        return await answer(self._stub.GetDigest(digests_pb2.GetDigestRequest(id=identity), timeout=self._timeout))

    async def flush(self, identity: str) -> digests_pb2.Digest:
        """Closes a digest at once and returns it; one that is closed already as it is. UNKNOWN_DIGEST if there is none,
        DIGEST_CANCELLED if it becomes nothing any more.
        """
        return await answer(self._stub.FlushDigest(digests_pb2.FlushDigestRequest(id=identity), timeout=self._timeout))
