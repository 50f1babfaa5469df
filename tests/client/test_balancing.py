"""Calls among several replicas: in turns, away from one that begins to stop, and again where that is safe."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from tests.harness import until
from tidings.client import ApiError, Users, connect
from tidings.client.channel import _OPTIONS
from tidings.notifications.v1 import (
    digests_pb2,
    endpoints_pb2,
    in_app_pb2,
    notifications_pb2,
    preferences_pb2,
    sends_pb2,
    templates_pb2,
)
from tidings.users.v1 import users_pb2, users_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Directory(users_pb2_grpc.UserServiceServicer):
    """Answers, or refuses the next calls."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuse = 0

    async def CreateUser(self, request: users_pb2.CreateUserRequest, context: Context) -> users_pb2.User:
        """The user, or a refusal."""
        self.asked.append(request.request_id)
        if self.refuse:
            self.refuse -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        return request.user


@dataclass(frozen=True)
class Replica:
    """A server, and how to tell that it begins to stop."""

    directory: Directory
    health: HealthServicer
    address: str


@pytest.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    """Two that serve."""
    servers, made = [], []
    for _ in range(2):
        server, replica = grpc.aio.server(), Replica(Directory(), HealthServicer(), "")  # type: ignore[abstract]
        users_pb2_grpc.add_UserServiceServicer_to_server(replica.directory, server)
        health_pb2_grpc.add_HealthServicer_to_server(replica.health, server)
        await replica.health.set("balancing", _SERVING)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        made.append(Replica(replica.directory, replica.health, f"127.0.0.1:{port}"))
    yield made
    for server in servers:
        await server.stop(None)


def _address(replicas: list[Replica]) -> str:
    return "ipv4:" + ",".join(replica.address for replica in replicas)


async def _counts(users: Users, replicas: list[Replica], calls: int) -> list[int]:
    for replica in replicas:
        replica.directory.asked.clear()
    for _ in range(calls):
        await users.create(users_pb2.User())
    return [len(replica.directory.asked) for replica in replicas]


async def test_a_replica_that_begins_to_stop_is_called_no_more_and_one_that_comes_back_is(
    replicas: list[Replica],
) -> None:
    async with connect(_address(replicas)) as channel:
        users = Users(channel)

        async def all_are_called() -> bool:
            return min(await _counts(users, replicas, 10)) > 0

        await until(all_are_called)
        assert await _counts(users, replicas, 10) == [5, 5]
        await replicas[0].health.set("balancing", _NOT_SERVING)

        async def one_is_called() -> bool:
            return await _counts(users, replicas, 10) == [0, 10]

        await until(one_is_called)
        # Nothing follows from what is said of the database, which calls are told in words.
        await replicas[1].health.set("readiness", _NOT_SERVING)
        assert await _counts(users, replicas, 10) == [0, 10]
        await replicas[0].health.set("balancing", _SERVING)
        await until(all_are_called)


async def test_a_call_that_is_refused_is_made_again_with_the_same_request_id(replicas: list[Replica]) -> None:
    [replica, _] = replicas
    async with connect(replica.address) as channel:
        replica.directory.refuse = 3
        await Users(channel).create(users_pb2.User(), request_id="one")
        assert replica.directory.asked == ["one"] * 4
        replica.directory.refuse = 4
        with pytest.raises(ApiError):
            await Users(channel).create(users_pb2.User())
        assert len(set(replica.directory.asked[4:])) == 1


def test_what_is_tried_again_reads_or_has_a_request_id() -> None:
    [config] = [json.loads(str(value)) for name, value in _OPTIONS if name == "grpc.service_config"]
    retried = {(one["service"], one["method"]) for method in config["methodConfig"] for one in method["name"]}
    reads = ("Get", "BatchGet", "List", "Explain")
    # A repeat does no harm but is refused, as if nothing had been done: that is for the caller to judge.
    once = {
        *("ReplayDeliveries", "DiscardDeliveries", "UpdateInAppNotifications"),
        *("UpdateEndpoint", "DeleteEndpoint", "RotateEndpointSecret", "TestEndpoint", "EnableEndpoint"),
        *("DisableEndpoint", "PreviewTemplate", "SendTestTemplate", "ReloadTemplates"),
        *("UpdatePreferences", "CreateSuppression", "DeleteSuppression"),
    }
    # Answers a repeat as it answered the first.
    same = {"CancelSend", "FlushDigest"}
    safe = set()
    for service in (
        users_pb2.DESCRIPTOR.services_by_name["UserService"],
        notifications_pb2.DESCRIPTOR.services_by_name["NotificationService"],
        in_app_pb2.DESCRIPTOR.services_by_name["InAppService"],
        endpoints_pb2.DESCRIPTOR.services_by_name["EndpointService"],
        templates_pb2.DESCRIPTOR.services_by_name["TemplateService"],
        preferences_pb2.DESCRIPTOR.services_by_name["PreferenceService"],
        sends_pb2.DESCRIPTOR.services_by_name["SendService"],
        digests_pb2.DESCRIPTOR.services_by_name["DigestService"],
    ):
        for method in service.methods:
            request = method.input_type
            # A batch has one in each of its requests.
            inner = request.fields_by_name.get("requests")
            fields = ((inner and inner.message_type) or request).fields_by_name
            unary = not (method.server_streaming or method.client_streaming)
            if unary and (method.name.startswith(reads) or "request_id" in fields or method.name in same):
                safe.add((service.full_name, method.name))
            else:
                # Streams go on where they were by themselves.
                assert not unary or method.name in once, method.full_name
    assert retried == safe
