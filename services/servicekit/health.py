"""What a server tells of itself by grpc.health.v1."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from servicekit import logs

log = logs.get(__name__)


class Health:
    """grpc.health.v1 with the names `""`, `balancing`, `liveness`, `readiness`, `startup` and the service's own.

    `liveness` and `startup` serve as soon as the process answers, `balancing` also, until it begins to stop: clients
    that take turns among replicas watch it, and leave before calls are refused. The others follow `set_ready`.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._ready: bool | None = None
        self._closed = False
        self.servicer = HealthServicer()

    async def start(self) -> None:
        """Alive and started, not ready yet."""
        serving = health_pb2.HealthCheckResponse.SERVING
        await self.servicer.set("liveness", serving)
        await self.servicer.set("startup", serving)
        await self.servicer.set("balancing", serving)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Tells whether callers should be sent here. After `close` it stays false."""
        ready = ready and not self._closed
        if ready == self._ready:
            return
        self._ready = ready
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", "readiness", self._service):
            await self.servicer.set(name, status)
        log.info("readiness changed", ready=ready)

    async def close(self) -> None:
        """NOT_SERVING for good."""
        self._closed = True
        await self.servicer.set("balancing", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.set_ready(False)

    async def follow(self, check: Callable[[], Awaitable[bool]], interval: float = 2.0) -> None:
        """A background loop: readiness follows `check`, which is bounded in time and may raise."""
        while True:
            try:
                async with asyncio.timeout(interval):
                    ready = await check()
            except Exception as error:
                log.warning("not ready", reason=f"{type(error).__name__}: {error}")
                ready = False
            await self.set_ready(ready)
            # Until the first success look again soon: whoever starts the process waits for it.
            await asyncio.sleep(interval if ready else 0.2)
