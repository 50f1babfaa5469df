"""What stands around every method of a server but those of health: who calls is known, and may call it, before the
servicer sees the call; and what the servicer raises becomes a status.

The guard sits on the handler and not in an interceptor, for an interceptor costs each call another coroutine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from servicekit import logs, metrics, telemetry, tracing
from servicekit.callers import Call, Source, admit
from servicekit.ending import code_of
from servicekit.errors import DOMAIN, ServiceError

log = logs.get(__name__)


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


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> None:
    """Ends a call with the status of an error."""
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def _unexpected(method: str, error: Exception) -> ServiceError:
    """What a caller learns of an error that nobody foresaw. The log says the rest."""
    log.error("unexpected error in a call", method=method, exc_info=error)
    return ServiceError("internal error; the server's log says more")


def _guard_unary(source: Source, method: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    async def admitted(request: Any, call: Call) -> Any:
        try:
            admit(source, method, call)
            return await behaviour(request, call)
        except (ServiceError, grpc.aio.BaseError):
            raise
        except Exception as error:
            raise _unexpected(method, error) from error

    answer = tracing.traced(method, admitted) if telemetry.enabled() else admitted

    ended = metrics.calls_of(method)

    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        began, code = perf_counter(), "OK"
        try:
            return await answer(request, Call(context))
        except ServiceError as error:
            code = code_of(error, context)
            await abort(context, error)
        except BaseException as error:
            code = code_of(error, context)
            raise
        finally:
            ended(code, began)

    return guarded


def _guard_stream(source: Source, method: str, behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
    ended = metrics.calls_of(method)

    # grpc.aio dispatches by isasyncgenfunction, so the guard is an async generator function itself.
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        telemetry.suppress()
        began, code = perf_counter(), "OK"
        metrics.streams_changed(method, 1)
        try:
            call = Call(context)
            admit(source, method, call)
            async for message in behaviour(request, call):
                yield message
        except ServiceError as error:
            code = code_of(error, context)
            await abort(context, error)
        except BaseException as error:
            code = code_of(error, context)
            if isinstance(error, grpc.aio.BaseError) or not isinstance(error, Exception):
                raise
            await abort(context, _unexpected(method, error))
        finally:
            metrics.streams_changed(method, -1)
            ended(code, began)

    return guarded


class _GuardedServer:
    """Stands for the server while a generated `add_..._to_server` registers: wraps each method in the guard."""

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
