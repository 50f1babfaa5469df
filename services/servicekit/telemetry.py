"""OpenTelemetry traces, set up once per process, and the W3C trace context that is carried on.

Tracing is on if an OTLP endpoint is configured (`OTEL_EXPORTER_OTLP_ENDPOINT` or its traces variant) or
`OTEL_TRACES_EXPORTER` names an exporter. The SDK's variables hold, those of the sampler, the resource, the batch
processor, the limits and the exporter. Without tracing the context of a caller is still carried on: an event keeps the
trace of the call that made it, whether or not this process exports spans.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from servicekit.configfile import InvalidConfigError
from servicekit.errors import ServiceError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

_PROPAGATOR = TraceContextTextMapPropagator()
# Marks a context whose spans are exported whatever the sampler says.
SAMPLED = contexts.create_key("sampled")


@functools.cache
def enabled() -> bool:
    """Whether this process exports spans. The environment is asked once."""
    return exporter_name("TRACES") != "none"


def exporter_name(signal: str) -> str:
    """Where TRACES or METRICS go: `otlp`, `console`, `none`, or something that is not known."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return "none"
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return os.environ.get(f"OTEL_{signal}_EXPORTER") or ("otlp" if endpoint else "none")


def known_exporter(signal: str) -> str:
    """The same, `otlp` only by gRPC. Raises InvalidConfigError for what is not known."""
    name = exporter_name(signal)
    if name not in ("otlp", "console", "none"):
        raise InvalidConfigError(f"OTEL_{signal}_EXPORTER: must be otlp, console or none, not {name!r}")
    general = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or general
    if name == "otlp" and protocol != "grpc":
        raise InvalidConfigError(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL: must be grpc, not {protocol!r}")
    return name


@functools.cache
def resource(service: str) -> Resource:
    """What this process says of itself; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say it better."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = Resource.create(
        {
            "service.name": service,
            "service.namespace": "tidings",
            "service.version": version("tidings"),
            "service.instance.id": str(uuid.uuid4()),
        }
    )
    return ours.merge(OTELResourceDetector().detect())


@functools.cache
def draw() -> Callable[[], bool] | None:
    """What says of each new trace whether it is sampled, if the sampler goes by the parent and by a share of the rest;
    None if it is of another kind and must be asked.

    It saves the span that is not exported: an unsampled call costs as little as it does without traces.
    """
    name = os.environ.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    if name == "parentbased_always_on":
        return lambda: True
    if name == "parentbased_always_off":
        return lambda: False
    if name == "parentbased_traceidratio":
        with contextlib.suppress(ValueError):
            share = float(os.environ.get("OTEL_TRACES_SAMPLER_ARG") or 1)
            return lambda: random.random() < share  # noqa: S311 - no secret
    return None


@contextmanager
def tracing(service: str) -> Iterator[None]:
    """Exports spans for as long as it is open; flushes them at its end, for at most 2 s. Raises InvalidConfigError."""
    if not enabled():
        yield
        return
    # Takes a tenth of a service's start, for nothing where spans are not exported.
    from servicekit import traces_export

    with traces_export.exporting(known_exporter("TRACES"), resource(service)):
        yield


def suppress() -> None:
    """Lets libraries start no spans in what is left of the current task."""
    contexts.attach(contexts.set_value(contexts._SUPPRESS_INSTRUMENTATION_KEY, True))


def sampled() -> Context:
    """A context without a parent whose spans are exported whatever the sampler says: for a batch that links to sampled
    traces.
    """
    return contexts.set_value(SAMPLED, True, Context())


def failed(span: Span, error: BaseException) -> None:
    """Notes on a span what ended it."""
    span.set_attribute("error.type", error.reason if isinstance(error, ServiceError) else type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR))


# The context that is carried on


def carried(span: trace.SpanContext) -> tuple[str, str]:
    """`(traceparent, tracestate)` of a span."""
    state = span.trace_state.to_header() if span.trace_state else ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}", state


def unsampled(parent: str) -> str:
    """The same traceparent for whoever must not export spans for it; empty if it was."""
    return f"{parent[:-2]}00" if parent else ""


def is_valid(parent: str) -> bool:
    """Whether a traceparent is one."""
    return trace.get_current_span(extract(parent, "")).get_span_context().is_valid


def extract(parent: str, state: str) -> Context:
    """The context that a stored trace context stands for."""
    return _PROPAGATOR.extract({"traceparent": parent, "tracestate": state}, context=Context())
