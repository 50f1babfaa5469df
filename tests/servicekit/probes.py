"""Asks health as an operator and as a balancer do: by Check, and by Watch for as long as a test lasts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.harness import until

NAMES = ("liveness", "startup", "balancing", "readiness", "")


async def check(address: str, name: str) -> tuple[str, dict[str, str]]:
    """The status of a name and the metadata with it."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        call = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        answer = await call
        told = {str(key): str(value) for key, value in await call.trailing_metadata()}
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status), told


async def statuses(address: str, *more: str) -> dict[str, bool]:
    """Which names are SERVING."""
    return {name: (await check(address, name))[0] == "SERVING" for name in (*NAMES, *more)}


class Watched:
    """What Watch has said of each name, the first first."""

    def __init__(self) -> None:
        self.said: dict[str, list[bool]] = {}

    async def saw(self, name: str, *expected: bool, timeout: float = 60.0) -> None:
        """Waits until exactly this was said."""
        await until(lambda: len(self.said[name]) >= len(expected), timeout, f"{name}: {expected}")
        assert self.said[name] == list(expected), name

    async def becomes(self, name: str, expected: bool, timeout: float = 60.0) -> None:
        """Waits until this is the last that was said: a machine that is slow may add a change and its end before."""
        await until(lambda: self.said[name][-1] is expected, timeout, f"{name} becomes {expected}")


@asynccontextmanager
async def watching(address: str, *names: str) -> AsyncIterator[Watched]:
    """Watches names, each by a call of its own."""
    watched = Watched()

    async def follow(stub: Any, name: str) -> None:
        said = watched.said[name] = []
        # A server that stops ends the call.
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=name)):
                said += [answer.status == health_pb2.HealthCheckResponse.SERVING]

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        following = [asyncio.create_task(follow(stub, name)) for name in names]
        await until(lambda: all(watched.said.get(name) for name in names), what="the first answers")
        yield watched
        for one in following:
            one.cancel()
        await asyncio.gather(*following, return_exceptions=True)
