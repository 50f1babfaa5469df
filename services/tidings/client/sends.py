"""Sends: notifications for users by their ids or by a filter, now or later, once per request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc.aio

from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, new_request_id, pages
from tidings.notifications.v1 import sends_pb2, sends_pb2_grpc

_ENDED = (sends_pb2.Send.SENT, sends_pb2.Send.CANCELLED, sends_pb2.Send.FAILED)


class Sends:
    """Calls SendService. `timeout` bounds each call, in seconds. Every method raises ApiError."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = sends_pb2_grpc.SendServiceStub(channel)
        self._timeout = timeout

    async def create(
        self, send: sends_pb2.Send, *, request_id: str | None = None, validate_only: bool = False
    ) -> sends_pb2.Send:
        """Sends a notification; a repetition with the same request_id returns the send that the first made. With
        `validate_only` nothing is stored, and the counts are as of now.
        """
        request = sends_pb2.SendNotificationRequest(
            send=send, request_id=request_id or new_request_id(), validate_only=validate_only
        )
        return await answer(self._stub.SendNotification(request, timeout=self._timeout))

    async def get(self, send_id: str) -> sends_pb2.Send:
        """A send."""
        return await answer(self._stub.GetSend(sends_pb2.GetSendRequest(id=send_id), timeout=self._timeout))

    async def list(
        self,
        *,
        state: sends_pb2.Send.State.ValueType = sends_pb2.Send.STATE_UNSPECIFIED,
        category: str = "",
        actor: str = "",
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[sends_pb2.Send, None]:
        """Sends, newest first, without what is long; pages are fetched as they are needed."""
        request = sends_pb2.ListSendsRequest(page_size=page_size)
        request.filter.CopyFrom(sends_pb2.ListSendsRequest.Filter(state=state, category=category, actor=actor))
        async for page in pages(self._stub.ListSends, request, self._timeout):
            for send in page.sends:
                yield send

    async def cancel(self, send_id: str) -> sends_pb2.Send:
        """Cancels a send; one that is cancelled already is returned as it is."""
        return await answer(self._stub.CancelSend(sends_pb2.CancelSendRequest(id=send_id), timeout=self._timeout))

    async def watch(self, send_id: str, *, every: float = 0.5) -> AsyncGenerator[sends_pb2.Send, None]:
        """A send as it goes on, asked for every so many seconds; the last is one that is SENT, CANCELLED or FAILED."""
        while True:
            send = await self.get(send_id)
            yield send
            if send.state in _ENDED:
                return
            await asyncio.sleep(every)
