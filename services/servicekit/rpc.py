"""gRPC servers: one place for options, health, reflection and the order of a start and of a clean shutdown.

A server answers health from its first moment (`open_door`), also while it waits for its schema; every other call is
refused with UNAVAILABLE until it serves (`serve`). At SIGTERM: health turns NOT_SERVING, the service drains its
streams, the server stops within its grace, background loops are joined. If a background loop dies the same happens,
with exit code 1.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio as reflection

from servicekit import guard, logs, metrics, tasks
from servicekit.addresses import is_loopback
from servicekit.callers import Call, anyone
from servicekit.entrance import Entrance
from servicekit.errors import InvalidArgumentError, UnavailableError
from servicekit.health import Health
from servicekit.tasks import Background

log = logs.get(__name__)

# A loop that keeps up and begins no call for so many looks in a row has begun what was received; seconds between looks.
_CALM_LOOKS, _LOOK = 5, 0.05
LONGEST_SETTLE = 3.0

_HEALTH: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]
_REFLECTION: Any = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
_CHANNELZ: Any = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"]

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
    """The methods of a server that are guarded, as `package.Service/Method`: those of its services, of reflection and
    of channelz, whether or not these two are switched on.
    """
    return frozenset(
        f"{service.full_name}/{method.name}"
        for service in (*services, _REFLECTION, _CHANNELZ)
        for method in service.methods
    )


class _Closed(grpc.GenericRpcHandler):
    """Refuses what has no method yet, while the server is starting."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.is_open = False

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return None if self.is_open else grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        error = UnavailableError(
            f"the server is starting: {self._health.why('startup')}", reason="STARTING", retry_after=1.0
        )
        await guard.abort(context, error)
        yield b""


@dataclass(frozen=True, slots=True)
class Door:
    """A server that answers health and nothing else yet, where it listens, and whether it was told to stop."""

    entrance: Entrance
    health: Health
    server: grpc.aio.Server
    # Those of the server and, if it has one, of the server of health alone, by their settings.
    servers: tuple[grpc.aio.Server, ...]
    bound: Mapping[str, str]
    closed: _Closed
    stop: asyncio.Event

    async def unless_stopped(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Does something before serving; gives it up and returns False when the process is told to stop."""
        doing, stopping = asyncio.create_task(work), asyncio.create_task(self.stop.wait())
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if doing.done():
            await doing
            return True
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)
        log.info("stopped", reason="signal")
        return False


@asynccontextmanager
async def open_door(entrance: Entrance, health: Health) -> AsyncIterator[Door | None]:
    """Listens and answers health until the end of the block. None, and a line in the log, if it cannot listen."""
    closed = _Closed(health)
    server = _health_server(health)
    server.add_generic_rpc_handlers((closed,))
    wanted = {"address": (server, entrance.address, entrance.credentials)}
    if entrance.health_address:
        wanted["health_address"] = (_health_server(health), entrance.health_address, None)
    bound = {name: address for name, where in wanted.items() if (address := _bound(*where)) is not None}
    if len(bound) < len(wanted):
        yield None
        return
    stop = tasks.told_to_stop()
    servers = tuple(one for one, *_ in wanted.values())
    for one in servers:
        await one.start()
    log.info("listening", **bound)
    try:
        yield Door(entrance, health, server, servers, bound, closed, stop)
    finally:
        await asyncio.gather(*(one.stop(0) for one in servers))


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


def add_tools(door: Door, *services: ServiceDescriptor) -> None:
    """Adds reflection, of itself and of these services, and channelz, if the settings want them.

    What they tell is for callers, too.
    """
    server, entrance = door.server, door.entrance
    described = [*services, _HEALTH, *([_CHANNELZ] if entrance.channelz else []), _REFLECTION]
    if entrance.reflection:
        reflecting = reflection.ReflectionServicer([service.full_name for service in described])
        guard.add(server, entrance.source, reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflecting)
    if entrance.channelz:
        from grpc_channelz.v1 import channelz_pb2_grpc
        from grpc_channelz.v1._async import ChannelzServicer

        guard.add(server, entrance.source, channelz_pb2_grpc.add_ChannelzServicer_to_server, ChannelzServicer())


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
    door: Door,
    background: Background,
    *,
    not_ready: Callable[[], Awaitable[str]],
    drain: Callable[[], Awaitable[None]],
    grace: float,
    finish: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Serves until SIGTERM, SIGINT or the death of a background loop. Returns the exit code.

    Readiness follows `not_ready`, which says why not. At the end `drain` asks the service's streams to end and returns
    when they have, or gives up by itself; `finish` then answers what calls wait for and refuses new work; what still
    runs gets `grace` seconds.
    """
    entrance, health = door.entrance, door.health
    _calm_collector()
    door.closed.is_open = True
    health.started()
    background.start(health.follow(not_ready, background), "readiness")
    metrics.read_process(lambda: background.running, lambda: health.is_ready)
    if metrics.seen():
        background.start(metrics.measure_loop(), "event-loop")
    for mounted in entrance.followed:
        background.start(mounted.follow(), mounted.name)
    log.info("serving", **door.bound, tls=entrance.credentials is not None, tokens=entrance.source is not anyone)
    if entrance.credentials is None and not is_loopback(entrance.address):
        log.warning("without TLS beyond this machine: something else must encrypt", address=entrance.address)

    await background.until_over(door.stop)
    health.close()
    await drain()
    if finish is not None:
        await finish()
    await _settle()
    health.end()
    await asyncio.gather(*(one.stop(grace) for one in door.servers))
    await background.stop()
    log.info("stopped")
    return 1 if background.failure else 0


def page_size(asked: int, default: int = 50, limit: int = 1000) -> int:
    """The size of a page as AIP-158 has it: 0 is the default, more than the limit is the limit."""
    if asked < 0:
        raise InvalidArgumentError("page_size: must not be negative", reason="INVALID_FIELD")
    return min(asked or default, limit)
