"""EndpointService as callers see it: checks a request, changes endpoints and has them read again, and calls one for a
test.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import grpc.aio
from uuid_utils.compat import uuid7

from notification_service import errors
from notification_service.api import requests
from notification_service.channels import Message
from notification_service.channels.webhook import WebhookChannel
from notification_service.destinations import (
    BAD_SECRET,
    Destination,
    State,
    is_secret,
    new_secret,
    target_of,
    wrong_with_url,
)
from notification_service.domain import TARGET_GONE, WEBHOOK, stamp
from notification_service.egress import Network
from notification_service.registry import Endpoints
from notification_service.rules import HEARD
from notification_service.store import endpoints as store
from notification_service.store import pending
from servicekit import callers, logs
from servicekit.database import Pool
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import endpoints_pb2 as pb
from tidings.notifications.v1 import endpoints_pb2_grpc

log = logs.get(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]

CALLER_FIELDS = ("name", "url", "description", "events", "categories", "rate_limit")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST_TEXT = 500
_MOST_CATEGORIES = 100
_LONGEST_CATEGORY = 63
_FASTEST = 10_000.0
_DEFAULT_OVERLAP = 86_400.0
_LONGEST_OVERLAP = 30 * 86_400.0
# Positions in page tokens: those of the operator's file come after all others, so they have the first ones.
_ROOM_FOR_FILE = 1 << 20


class EndpointService(endpoints_pb2_grpc.EndpointServiceServicer):
    """The servicer. `resumed` is called when deliveries that waited, or are to end, may be looked at; `networks` are
    allowed besides public addresses.
    """

    def __init__(
        self,
        pool: Pool,
        endpoints: Endpoints,
        channel: WebhookChannel,
        resumed: Callable[[], None],
        networks: Sequence[Network] = (),
    ) -> None:
        self._pool = pool
        self._endpoints = endpoints
        self._channel = channel
        self._resumed = resumed
        self._networks = tuple(networks)

    async def CreateEndpoint(self, request: pb.CreateEndpointRequest, context: _Context) -> pb.CreateEndpointResponse:
        violations: list[Violation] = []
        fields = self._checked(request.endpoint, CALLER_FIELDS, violations)
        _check_secret(request.secret, violations)
        request_id = None
        if request.request_id:
            try:
                request_id = uuid.UUID(request.request_id)
            except ValueError:
                violations.append(Violation("request_id", "must be a UUID"))
        if violations:
            raise invalid(*violations)
        self._check_free(fields["name"])
        said = json.dumps([callers.name_of(context), fields, request.secret], sort_keys=True)
        new = store.New(
            uuid7(), fields, request.secret or new_secret(), request_id, hashlib.sha256(said.encode()).digest()
        )
        async with requests.connection(self._pool) as connection:
            made, secret = await store.create(connection, new)
        await self._endpoints.changed()
        log.info("webhook endpoint created", endpoint_id=str(made.id))
        return pb.CreateEndpointResponse(endpoint=_message(made), secret=secret)

    async def GetEndpoint(self, request: pb.GetEndpointRequest, context: _Context) -> pb.Endpoint:
        return _message(await self._found(request.id))

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: _Context) -> pb.ListEndpointsResponse:
        filters: dict[str, Any] = {}
        if request.filter.state:
            if request.filter.state not in {int(state) for state in State}:
                raise invalid(Violation("filter.state", "is no state of an endpoint"))
            filters["state"] = State(request.filter.state)
        size, selection, before = requests.page(request, filters)
        async with requests.connection(self._pool) as connection:
            of_api = await store.read_all(connection)
        numbered = [(_ROOM_FOR_FILE + (one.position or 0), one) for one in of_api]
        of_file = self._endpoints.of_file
        numbered += [(len(of_file) - number, one) for number, one in enumerate(of_file)]
        found = [
            (position, one)
            for position, one in numbered
            if position < before and one.state is filters.get("state", one.state)
        ][: size + 1]
        return pb.ListEndpointsResponse(
            endpoints=[_message(one) for _, one in found[:size]],
            next_page_token=requests.next_page([position for position, _ in found], size, selection),
        )

    async def UpdateEndpoint(self, request: pb.UpdateEndpointRequest, context: _Context) -> pb.Endpoint:
        paths = list(request.update_mask.paths)
        identity = self._changeable(request.endpoint.id, "endpoint.id")
        names = ", ".join(CALLER_FIELDS)
        violations = [
            Violation("update_mask", f"{path!r} is not one of {names}") for path in paths if path not in CALLER_FIELDS
        ]
        if not paths:
            violations.append(Violation("update_mask", f"is required: any of {names}"))
        fields = self._checked(request.endpoint, paths, violations)
        if violations:
            raise invalid(*violations)
        if "name" in fields:
            self._check_free(fields["name"])
        async with requests.connection(self._pool) as connection:
            changed = await store.change(connection, identity, fields, request.endpoint.version)
        await self._endpoints.changed()
        return _message(changed)

    async def DeleteEndpoint(self, request: pb.DeleteEndpointRequest, context: _Context) -> pb.DeleteEndpointResponse:
        identity = self._changeable(request.id)
        async with requests.connection(self._pool) as connection:
            await store.remove(connection, identity, request.version)
            # Apart: should it fail, what waits is cancelled a little later by who looks for such.
            cancelled = await pending.cancel_target(connection, WEBHOOK, target_of(identity), reason=TARGET_GONE)
        await self._endpoints.changed()
        log.info("webhook endpoint deleted", endpoint_id=request.id, deliveries_cancelled=len(cancelled))
        return pb.DeleteEndpointResponse()

    async def RotateEndpointSecret(
        self, request: pb.RotateEndpointSecretRequest, context: _Context
    ) -> pb.RotateEndpointSecretResponse:
        identity = self._changeable(request.id)
        violations: list[Violation] = []
        _check_secret(request.secret, violations)
        overlap = _DEFAULT_OVERLAP
        if request.HasField("overlap"):
            overlap = request.overlap.seconds + request.overlap.nanos / 1e9
            if not 0 <= overlap <= _LONGEST_OVERLAP:
                violations.append(Violation("overlap", "must be 0 to 30 days"))
        if violations:
            raise invalid(*violations)
        secret = request.secret or new_secret()
        async with requests.connection(self._pool) as connection:
            changed = await store.rotate(connection, identity, secret, overlap, request.version)
        await self._endpoints.changed()
        log.info("webhook secret rotated", endpoint_id=request.id, overlap_seconds=overlap)
        return pb.RotateEndpointSecretResponse(endpoint=_message(changed), secret=secret)

    async def TestEndpoint(self, request: pb.TestEndpointRequest, context: _Context) -> pb.TestEndpointResponse:
        endpoint = await self._found(request.id)
        now = datetime.now(UTC)
        message = Message(
            target=endpoint.target, idempotency_key=str(uuid.uuid4()), content=_example(now), create_time=now
        )
        began = perf_counter()
        outcome = await self._channel.call(endpoint, message)
        answer = pb.TestEndpointResponse(
            outcome=pb.TestEndpointResponse.Outcome.Value(outcome.result.name),
            code=outcome.code,
            detail=outcome.detail,
            webhook_id=message.idempotency_key,
        )
        answer.duration.FromNanoseconds(int((perf_counter() - began) * 1e9))
        return answer

    async def EnableEndpoint(self, request: pb.EnableEndpointRequest, context: _Context) -> pb.Endpoint:
        identity = self._changeable(request.id)
        async with requests.connection(self._pool) as connection:
            changed = await store.enable(connection, identity, request.version)
        await self._endpoints.changed()
        self._resumed()
        log.info("webhook endpoint enabled", endpoint_id=request.id)
        return _message(changed)

    async def DisableEndpoint(self, request: pb.DisableEndpointRequest, context: _Context) -> pb.Endpoint:
        identity = self._changeable(request.id)
        if (wrong := _wrong_with_text(request.reason)) is not None:
            raise invalid(Violation("reason", wrong))
        async with requests.connection(self._pool) as connection:
            changed = await store.disable(connection, identity, request.reason, request.version)
        await self._endpoints.changed()
        log.info("webhook endpoint disabled by hand", endpoint_id=request.id)
        return _message(changed)

    async def _found(self, text: str) -> Destination:
        identity = requests.one_id(text, "id")
        for one in self._endpoints.of_file:
            if one.id == identity:
                return one
        async with requests.connection(self._pool) as connection:
            found = await store.read(connection, identity)
        if found is None:
            raise errors.unknown_endpoint(text)
        return found

    def _changeable(self, text: str, path: str = "id") -> uuid.UUID:
        identity = requests.one_id(text, path)
        for one in self._endpoints.of_file:
            if one.id == identity:
                raise errors.endpoint_of_file(one.name)
        return identity

    def _check_free(self, name: str) -> None:
        if any(one.name == name for one in self._endpoints.of_file):
            raise errors.name_taken(name)

    def _checked(self, given: pb.Endpoint, names: Sequence[str], violations: list[Violation]) -> dict[str, Any]:
        """The named fields of an endpoint as they are stored."""
        wrong = {
            "name": None
            if _NAME.fullmatch(given.name)
            else "must be 1 to 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit",
            "url": wrong_with_url(given.url, self._networks),
            "description": _wrong_with_text(given.description),
            "events": _wrong_with_events(given.events),
            "categories": _wrong_with_categories(given.categories),
            "rate_limit": None
            if math.isfinite(given.rate_limit) and 0 <= given.rate_limit <= _FASTEST
            else f"must be 0 to {_FASTEST:g}",
        }
        violations += [Violation(f"endpoint.{name}", text) for name, text in wrong.items() if name in names and text]
        fields = {
            "name": given.name,
            "url": given.url,
            "description": given.description,
            "events": sorted(set(given.events)),
            "categories": sorted(set(given.categories)),
            "rate_limit": given.rate_limit,
        }
        return {name: value for name, value in fields.items() if name in names}


def _check_secret(text: str, violations: list[Violation]) -> None:
    # The message says what a secret looks like, never what was given.
    if text and not is_secret(text):
        violations.append(Violation("secret", BAD_SECRET))


def _wrong_with_text(text: str) -> str | None:
    if len(text) > _LONGEST_TEXT:
        return f"must be at most {_LONGEST_TEXT} characters"
    return "must not hold control characters" if _CONTROL.search(text) else None


def _wrong_with_events(events: Sequence[str]) -> str | None:
    unknown = sorted(set(events) - set(HEARD))
    return f"{', '.join(unknown)[:200]}: not an event type, these are: {', '.join(HEARD)}" if unknown else None


def _wrong_with_categories(categories: Sequence[str]) -> str | None:
    if len(categories) > _MOST_CATEGORIES:
        return f"must be at most {_MOST_CATEGORIES}"
    if all(1 <= len(one) <= _LONGEST_CATEGORY and not _CONTROL.search(one) for one in categories):
        return None
    return f"each must be 1 to {_LONGEST_CATEGORY} characters, none of them a control character"


def _example(now: datetime) -> bytes:
    """The body of a test: of the shape of a webhook, of a type that no event has."""
    user = {"id": str(uuid.UUID(int=0)), "username": "example", "email": "example@example.com"}
    payload = {
        "type": "endpoint.test",
        "timestamp": now.isoformat().replace("+00:00", "Z"),
        "data": {"notification": None, "event": None, "user": user, "previous": None},
    }
    return json.dumps(payload, separators=(",", ":")).encode()


def _message(one: Destination) -> pb.Endpoint:
    of_file = one.position is None
    return pb.Endpoint(
        id=str(one.id),
        name=one.name,
        url=one.url,
        description=one.description,
        events=[name for name in HEARD if name in one.events],
        categories=sorted(one.categories),
        state=one.state.value,
        disable_reason=one.disable_reason,
        disable_time=stamp(one.disable_time),
        rate_limit=one.rate_limit,
        create_time=stamp(one.create_time),
        update_time=stamp(one.update_time),
        version=one.version,
        origin=pb.Endpoint.FILE if of_file else pb.Endpoint.API,
        target=one.target,
        secrets=[]
        if of_file
        else [
            pb.Endpoint.Secret(create_time=stamp(secret.create_time), expire_time=stamp(secret.expire_time))
            for secret in one.secrets
        ],
    )
