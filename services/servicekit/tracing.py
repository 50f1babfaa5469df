"""The span of a call, and the trace context that a caller sends.

A unary call is one span. A stream is none: it may last for weeks, and what it carries has spans of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from servicekit import telemetry
from servicekit.callers import Call
from servicekit.ending import code_of
from servicekit.errors import ServiceError

_LONGEST_STATE = 512  # what W3C Trace Context asks implementations to carry at least
# Statuses that are the server's fault; the others are answers (OpenTelemetry's conventions for gRPC).
_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


def traced(method: str, behaviour: Callable[[Any, Call], Awaitable[Any]]) -> Callable[[Any, Call], Awaitable[Any]]:
    """A unary behaviour in a span of its own, a child of the caller's; in none if nobody samples it."""
    tracer = trace.get_tracer(__name__)
    attributes = {"rpc.system.name": "grpc", "rpc.method": method}
    draw = telemetry.draw()
    root = Context() if draw is None else telemetry.sampled()

    async def in_span(request: Any, call: Call) -> Any:
        parent, state = _sent(call)
        if draw is not None and (parent.endswith("-00") if parent else not draw()):
            return await behaviour(request, call)
        context = telemetry.extract(parent, state) if parent else root
        span = tracer.start_span(method, context=context, kind=SpanKind.SERVER, attributes=attributes)
        token = contexts.attach(trace.set_span_in_context(span))
        code = "OK"
        try:
            return await behaviour(request, call)
        except BaseException as error:
            code = code_of(error, call)
            _fail(span, code, error)
            raise
        finally:
            if span.is_recording():
                span.set_attribute("rpc.response.status_code", code)
                if call.caller:
                    span.set_attribute("tidings.caller", call.caller)
            span.end()
            contexts.detach(token)

    return in_span


def _fail(span: Span, code: str, error: BaseException) -> None:
    if code == "CANCELLED":
        # The caller has gone: nothing failed.
        return
    # Without the message, which may name a user.
    named = type(error).__qualname__ if isinstance(error, Exception) else code
    reason = error.reason if isinstance(error, ServiceError) else named
    span.set_attribute("error.type", reason)
    if code in _FAULTS:
        span.set_status(Status(StatusCode.ERROR, reason))


def _sent(call: Call) -> tuple[str, str]:
    parent = state = ""
    for key, value in call.invocation_metadata():
        if key == "traceparent":
            parent = str(value)
        elif key == "tracestate":
            state = str(value)
    return parent, state


def incoming(call: Call | grpc.aio.ServicerContext[Any, Any]) -> tuple[str, str]:
    """`(traceparent, tracestate)` of a call: the current span's if there is one, else the caller's; empty if none."""
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        return telemetry.carried(current)
    parent, state = _sent(call)  # type: ignore[arg-type]
    if parent and not telemetry.is_valid(parent):
        return "", ""
    return parent, state[:_LONGEST_STATE] if parent else ""
