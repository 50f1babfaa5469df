"""OpenTelemetry, set up once per process, and the W3C trace context of a call.

Tracing is on if an OTLP endpoint is configured (`OTEL_EXPORTER_OTLP_ENDPOINT` or its traces variant) and
`OTEL_SDK_DISABLED` is not true. Without it the context of a caller is still carried on: an event keeps the trace of the
call that made it, whether or not this process exports spans.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import grpc.aio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_LONGEST_STATE = 512  # what W3C Trace Context asks implementations to carry at least


def enabled() -> bool:
    """Whether this process exports spans."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


@contextmanager
def tracing(service: str) -> Iterator[None]:
    """Exports spans for as long as it is open; flushes them at its end."""
    if not enabled():
        yield
        return
    # Takes a tenth of a service's start, for nothing where spans are not exported.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": service, "service.namespace": "tidings"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def incoming(context: grpc.aio.ServicerContext[object, object]) -> tuple[str, str]:
    """`(traceparent, tracestate)` of a call: the current span's if there is one, else the caller's; empty if none."""
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent", ""), carrier.get("tracestate", "")
    parent = state = ""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            parent = str(value)
        elif key == "tracestate":
            state = str(value)
    if parent and not is_valid(parent):
        return "", ""
    return parent, state[:_LONGEST_STATE] if parent else ""


def is_valid(parent: str) -> bool:
    """Whether a traceparent is one."""
    return trace.get_current_span(extract(parent, "")).get_span_context().is_valid


def extract(parent: str, state: str) -> Context:
    """The context that a stored trace context stands for."""
    return _PROPAGATOR.extract({"traceparent": parent, "tracestate": state}, context=Context())
