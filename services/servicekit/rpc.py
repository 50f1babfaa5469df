"""gRPC servers: one place for callers, errors, options, health, reflection and the order of a clean shutdown.

Every method but those of health is guarded: who calls is known, and may call it, before the servicer sees the call.

At SIGTERM: health turns NOT_SERVING, the service drains its streams, the server stops within its grace, background
loops are joined. If a background loop dies the same happens, with exit code 1.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio as reflection
from grpc_status import rpc_status

from servicekit import logs
from servicekit.addresses import is_loopback
from servicekit.callers import Call, Source, admit, anyone
from servicekit.entrance import Entrance
from servicekit.errors import DOMAIN, InvalidArgumentError, ServiceError
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


def _packed(detail: Any) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(detail)
    return box


def status_of(error: ServiceError) -> status_pb2.Status:
    """The google.rpc.Status of an error, with its details."""
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations
        ]
        details.append(_packed(error_details_pb2.BadRequest(field_violations=violations)))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message, details=details)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> None:
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


async def _abort_internal(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> None:
    log.error("unexpected error in a call", method=method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")


def _guard_unary(source: Source, method: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            call = Call(context)
            admit(source, method, call)
            return await behaviour(request, call)
        except ServiceError as error:
            await _abort(context, error)
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            raise
        except Exception as error:
            await _abort_internal(context, method, error)

    return guarded


def _guard_stream(source: Source, method: str, behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
    # grpc.aio dispatches by isasyncgenfunction, so the guard is an async generator function itself.
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            call = Call(context)
            admit(source, method, call)
            async for message in behaviour(request, call):
                yield message
        except ServiceError as error:
            await _abort(context, error)
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            raise
        except Exception as error:
            await _abort_internal(context, method, error)

    return guarded


class _GuardedServer:
    """Stands for the server while a generated `add_..._to_server` registers: wraps each method in the guard.

    The guard sits on the handler and not in an interceptor, for an interceptor costs each call another coroutine.
    """

    def __init__(self, server: grpc.aio.Server, source: Source, raw_responses: Sequence[str]) -> None:
        self._server = server
        self._source = source
        self._raw = frozenset(raw_responses)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Superseded by `add_registered_method_handlers`, which generated code calls right after."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, handler in handlers.items():
            method = f"{service}/{name}"
            serializer = None if name in self._raw else handler.response_serializer
            if handler.unary_unary is not None:
                wrapped[name] = grpc.unary_unary_rpc_method_handler(
                    _guard_unary(self._source, method, handler.unary_unary), handler.request_deserializer, serializer
                )
            elif handler.unary_stream is not None:
                wrapped[name] = grpc.unary_stream_rpc_method_handler(
                    _guard_stream(self._source, method, handler.unary_stream), handler.request_deserializer, serializer
                )
            elif handler.stream_stream is not None:
                # Requests are an iterator here; the guard only hands them on.
                wrapped[name] = grpc.stream_stream_rpc_method_handler(
                    _guard_stream(self._source, method, handler.stream_stream), handler.request_deserializer, serializer
                )
            else:
                raise NotImplementedError(f"{method}: no guard for a stream with one answer")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


class _AddServicer(Protocol):
    def __call__(self, servicer: Any, server: Any) -> None: ...


def add(
    server: grpc.aio.Server,
    source: Source,
    add_servicer: _AddServicer,
    servicer: Any,
    *,
    raw_responses: Sequence[str] = (),
) -> None:
    """Registers a servicer behind the guard. Methods in `raw_responses` yield bytes that are sent as they are."""
    add_servicer(servicer, _GuardedServer(server, source, raw_responses))


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
    add(made, entrance.source, reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflecting)
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
