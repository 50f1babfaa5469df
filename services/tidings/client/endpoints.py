"""Webhook endpoints: make, read, change and test them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

import grpc.aio
from google.protobuf import field_mask_pb2

from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, new_request_id, pages
from tidings.notifications.v1 import endpoints_pb2, endpoints_pb2_grpc

# A test waits for the endpoint, which gets 10 s unless the operator says otherwise; seconds.
_TEST_TIMEOUT = 60.0


class WebhookEndpoints:
    """Calls EndpointService. `timeout` bounds each call, in seconds. Every method raises ApiError.

    With a version a change is made only if that is the current one: so it can be repeated after its answer got lost.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = endpoints_pb2_grpc.EndpointServiceStub(channel)
        self._timeout = timeout

    async def create(
        self, endpoint: endpoints_pb2.Endpoint, *, secret: str = "", request_id: str | None = None
    ) -> tuple[endpoints_pb2.Endpoint, str]:
        """Creates an endpoint; returns it and its secret, which is not shown again. A repetition with the same
        request_id returns the first answer.
        """
        request = endpoints_pb2.CreateEndpointRequest(
            endpoint=endpoint, secret=secret, request_id=request_id or new_request_id()
        )
        made = await answer(self._stub.CreateEndpoint(request, timeout=self._timeout))
        return made.endpoint, made.secret

    async def get(self, endpoint_id: str) -> endpoints_pb2.Endpoint:
        """An endpoint."""
        request = endpoints_pb2.GetEndpointRequest(id=endpoint_id)
        return await answer(self._stub.GetEndpoint(request, timeout=self._timeout))

    async def list(
        self,
        *,
        state: endpoints_pb2.Endpoint.State.ValueType = endpoints_pb2.Endpoint.STATE_UNSPECIFIED,
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[endpoints_pb2.Endpoint, None]:
        """Endpoints, newest first, those of the operator's file last; pages are fetched as they are needed."""
        request = endpoints_pb2.ListEndpointsRequest(page_size=page_size)
        if state:
            request.filter.state = state
        async for page in pages(self._stub.ListEndpoints, request, self._timeout):
            for endpoint in page.endpoints:
                yield endpoint

    async def update(self, endpoint: endpoints_pb2.Endpoint, fields: Iterable[str]) -> endpoints_pb2.Endpoint:
        """Changes the named fields to what `endpoint` has; with `endpoint.version` set only if that is the current
        version.
        """
        request = endpoints_pb2.UpdateEndpointRequest(
            endpoint=endpoint, update_mask=field_mask_pb2.FieldMask(paths=fields)
        )
        return await answer(self._stub.UpdateEndpoint(request, timeout=self._timeout))

    async def delete(self, endpoint_id: str, *, version: int = 0) -> None:
        """Deletes an endpoint; its pending deliveries are parked."""
        request = endpoints_pb2.DeleteEndpointRequest(id=endpoint_id, version=version)
        await answer(self._stub.DeleteEndpoint(request, timeout=self._timeout))

    async def rotate_secret(
        self, endpoint_id: str, *, secret: str = "", overlap: float | None = None, version: int = 0
    ) -> tuple[endpoints_pb2.Endpoint, str]:
        """Gives an endpoint another secret; returns it and the secret, which is not shown again. The old ones go on
        signing for `overlap` seconds, 24 hours unless given.
        """
        request = endpoints_pb2.RotateEndpointSecretRequest(id=endpoint_id, secret=secret, version=version)
        if overlap is not None:
            request.overlap.FromNanoseconds(int(overlap * 1e9))
        rotated = await answer(self._stub.RotateEndpointSecret(request, timeout=self._timeout))
        return rotated.endpoint, rotated.secret

    async def test(self, endpoint_id: str) -> endpoints_pb2.TestEndpointResponse:
        """Sends one signed example event; how that went. Takes up to a minute."""
        request = endpoints_pb2.TestEndpointRequest(id=endpoint_id)
        return await answer(self._stub.TestEndpoint(request, timeout=max(self._timeout, _TEST_TIMEOUT)))

    async def enable(self, endpoint_id: str, *, version: int = 0) -> endpoints_pb2.Endpoint:
        """Switches an endpoint on: what waited goes on."""
        request = endpoints_pb2.EnableEndpointRequest(id=endpoint_id, version=version)
        return await answer(self._stub.EnableEndpoint(request, timeout=self._timeout))

    async def disable(self, endpoint_id: str, *, reason: str = "", version: int = 0) -> endpoints_pb2.Endpoint:
        """Switches an endpoint off: its pending deliveries wait, and none are made."""
        request = endpoints_pb2.DisableEndpointRequest(id=endpoint_id, reason=reason, version=version)
        return await answer(self._stub.DisableEndpoint(request, timeout=self._timeout))
