"""Reflection and channelz: switched by settings, and for callers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.harness import Authority, Callers, Database, Services

CODE = grpc.StatusCode


async def _services(channel: grpc.aio.Channel) -> set[str]:
    """What reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    [answer] = [answer async for answer in stub.ServerReflectionInfo(requests, timeout=5)]
    return {service.name for service in answer.list_services_response.service}


async def _no_reflection(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """How a call of reflection ends of which nothing is written: to write to a call that has ended is another error."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    code: grpc.StatusCode = await stub.ServerReflectionInfo(timeout=5).code()
    return code


async def _calls(channel: grpc.aio.Channel) -> int:
    """The calls that channelz has counted of its server."""
    stub: Any = channelz_pb2_grpc.ChannelzStub(channel)
    answer = await stub.GetServers(channelz_pb2.GetServersRequest(), timeout=5)
    return sum(server.data.calls_started for server in answer.server)


async def _refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_by_settings(users_database: Database, services: Services) -> None:
    service = await services.users(users_database).start()
    async with grpc.aio.insecure_channel(service.address) as channel:
        listed = await _services(channel)
        assert "tidings.users.v1.UserService" in listed
        assert "grpc.channelz.v1.Channelz" not in listed
        assert await _refused(_calls(channel)) is CODE.UNIMPLEMENTED
    await service.stop()
    other = await services.users(users_database, reflection="false", channelz="true").start()
    async with grpc.aio.insecure_channel(other.address) as channel:
        assert await _no_reflection(channel) is CODE.UNIMPLEMENTED
        assert await _calls(channel) > 0


async def test_for_callers_only(users_database: Database, services: Services, tmp_path: Path) -> None:
    authority, callers = Authority(tmp_path), Callers(tmp_path / "callers.toml")
    certificate, key = authority.issue("server")
    may, may_not = callers.add("ada", "Get*"), callers.add("eve", "WatchUsers")
    service = await services.users(
        users_database, channelz="true", callers_file=callers.path,
        tls_certificate_file=certificate, tls_key_file=key, health_listen="127.0.0.1:0",
    ).start()  # fmt: skip
    for token, code in ((None, CODE.UNAUTHENTICATED), (may_not, CODE.PERMISSION_DENIED), (may, None)):
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        if token is not None:
            credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
        async with grpc.aio.secure_channel(service.address, credentials) as channel:
            if code is None:
                assert await _calls(channel) > 0
            else:
                assert await _refused(_calls(channel)) is code
