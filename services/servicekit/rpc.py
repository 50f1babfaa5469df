"""gRPC servers: one place for options, health, reflection and the order of a clean shutdown.

At SIGTERM: health turns NOT_SERVING, the service drains its streams, the server stops within its grace, background
loops are joined. If a background loop dies the same happens, with exit code 1.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio as reflection

from servicekit import guard, logs
from servicekit.addresses import is_loopback
from servicekit.callers import Call, anyone
from servicekit.entrance import Entrance
from servicekit.errors import InvalidArgumentError
from servicekit.health import Health
from servicekit.tasks import Background

log = logs.get(__name__)

# A loop that keeps up and begins no call for so many looks in a row has begun what was received; seconds between looks.
_CALM_LOOKS, _LOOK = 5, 0.05
LONGEST_SETTLE = 3.0

_HEALTH: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]
_REFLECTION: Any = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

MAX_REQUEST_BYTES = 4 * 1024 * 1024

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.so_reuseport", 0),  # a second process on the port must fail, not share it
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # Clients may ping every 30 s on idle streams (the default refuses pings under 5 min).
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


def methods(*services: ServiceDescriptor) -> frozenset[str]:
    """The methods of a server that are guarded, as `package.Service/Method`: those of its services and reflection."""
    return frozenset(
        f"{service.full_name}/{method.name}" for service in (*services, _REFLECTION) for method in service.methods
    )


def server(entrance: Entrance, health: Health, *services: ServiceDescriptor) -> grpc.aio.Server:
    """A server with health and reflection; not started."""
    made = _health_server(health)
    names = [service.full_name for service in (*services, _HEALTH, _REFLECTION)]
    # What reflection tells is for callers, too.
    reflecting = reflection.ReflectionServicer(names)
    guard.add(made, entrance.source, reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflecting)
    return made


def _health_server(health: Health) -> grpc.aio.Server:
    made = grpc.aio.server(options=OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, made)
    return made


def _bound(made: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str | None:
    """Binds an address; returns it with its port, or None if it cannot be had."""
    try:
        port = made.add_secure_port(address, credentials) if credentials else made.add_insecure_port(address)
    except RuntimeError:
        log.error("address is taken or not allowed", address=address)
        return None
    return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"


def _calm_collector() -> None:
    """Lets the garbage collector look less often, and never at what was made before serving.

    By default it walks all that lives after some thousand new objects; a window of 100,000 events in memory made that a
    tenth of a server's time. Calls leave few cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


async def _settle() -> None:
    """Lets calls that were received be begun and refused: `stop` would cancel them, a status that no client retries."""
    loop = asyncio.get_running_loop()
    until, calm = loop.time() + LONGEST_SETTLE, 0
    while calm < _CALM_LOOKS and loop.time() < until:
        asleep, begun = loop.time(), Call.begun
        await asyncio.sleep(_LOOK)
        calm = calm + 1 if Call.begun == begun and loop.time() - asleep < 1.5 * _LOOK else 0


async def serve(
    made: grpc.aio.Server,
    entrance: Entrance,
    health: Health,
    background: Background,
    *,
    is_ready: Callable[[], Awaitable[bool]],
    drain: Callable[[], Awaitable[None]],
    grace: float,
    finish: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Serves until SIGTERM, SIGINT or the death of a background loop. Returns the exit code.

    Readiness follows `is_ready`. At the end `drain` asks the service's streams to end and returns when they have, or
    gives up by itself; `finish` then answers what calls wait for and refuses new work; what still runs gets `grace`
    seconds.
    """
    servers = {"address": (made, entrance.address, entrance.credentials)}
    if entrance.health_address:
        servers["health_address"] = (_health_server(health), entrance.health_address, None)
    bound = {name: _bound(*where) for name, where in servers.items()}
    if None in bound.values():
        return 1
    _calm_collector()
    for one, *_ in servers.values():
        await one.start()
    await health.start()
    background.start(health.follow(is_ready), "readiness")
    for mounted in entrance.followed:
        background.start(mounted.follow(), mounted.name)
    log.info("serving", **bound, tls=entrance.credentials is not None, tokens=entrance.source is not anyone)
    if entrance.credentials is None and not is_loopback(entrance.address):
        log.warning("without TLS beyond this machine: something else must encrypt", address=entrance.address)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(background.failed.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()

    log.info("stopping", reason=f"{background.failure} died" if background.failure else "signal")
    try:
        async with asyncio.timeout(1.0):  # a stuck Health.Watch must not hold up the rest
            await health.close()
    except TimeoutError:
        log.warning("health watchers did not take the news in time")
    await drain()
    if finish is not None:
        await finish()
    await _settle()
    await asyncio.gather(*(one.stop(grace) for one, *_ in servers.values()))
    await background.stop()
    log.info("stopped")
    return 1 if background.failure else 0


def page_size(asked: int, default: int = 50, limit: int = 1000) -> int:
    """The size of a page as AIP-158 has it: 0 is the default, more than the limit is the limit."""
    if asked < 0:
        raise InvalidArgumentError("page_size: must not be negative", reason="INVALID_FIELD")
    return min(asked or default, limit)
