"""An OpenTelemetry collector that keeps what it is sent by OTLP: real gRPC, everything in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it came; ids in hex, `parent` empty at a root, times in seconds, `links` as (trace, span)."""

    service: str
    trace: str
    id: str
    parent: str
    name: str
    kind: str
    start: float
    seconds: float
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    is_error: bool
    description: str


@dataclass(frozen=True, slots=True)
class Point:
    """A data point as it came; `value` is the count of a histogram, whose sum stands beside it."""

    service: str
    name: str
    unit: str
    kind: str
    attributes: dict[str, Any]
    value: float
    sum: float
    is_delta: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans and metrics. `endpoint` is for OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Span] = []
        self.points: list[Point] = []

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = _attributes(resource.resource.attributes).get("service.name", "")
            self.spans += [_span(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def last(self, name: str, **attributes: str) -> float:
        """The newest value of a series; keys of attributes have `_` for dots."""
        found = [
            point.value
            for point in self.points
            if point.name == name and attributes.items() <= _underscored(point.attributes).items()
        ]
        assert found, f"nothing came of {name} {attributes}"
        return found[-1]

    def named(self, name: str) -> list[Span]:
        """The spans of a name, by their start."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start)

    def trace(self, trace: str) -> list[Span]:
        """The spans of a trace, by their start."""
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.start)


def _span(service: str, span: trace_pb2.Span) -> Span:
    return Span(
        service=service,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        start=span.start_time_unix_nano / 1e9,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        attributes=_attributes(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        description=span.status.message,
    )


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, points: list[Point]) -> None:
        self._points = points

    async def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: Any
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        for resource in request.resource_metrics:
            service = _attributes(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_metrics:
                self._points += [point for metric in scope.metrics for point in _points(service, metric)]
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _points(service: str, metric: metrics_pb2.Metric) -> list[Point]:
    kind = str(metric.WhichOneof("data"))
    data = getattr(metric, kind)
    temporality = getattr(data, "aggregation_temporality", 0)

    def value(point: Any) -> float:
        return float(point.count if kind == "histogram" else getattr(point, str(point.WhichOneof("value"))))

    return [
        Point(
            service, metric.name, metric.unit, kind, _attributes(point.attributes), value(point),
            getattr(point, "sum", 0.0), temporality == metrics_pb2.AGGREGATION_TEMPORALITY_DELTA,
        )
        for point in data.data_points
    ]  # fmt: skip


def _underscored(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "_"): value for key, value in attributes.items()}


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")

    return {pair.key: value(pair) for pair in pairs}


def tree(spans: list[Span]) -> list[str]:
    """The spans of one trace as lines: names indented below their parents, with service and duration."""
    ids = {span.id for span in spans}
    lines: list[str] = []

    def add(span: Span, depth: int) -> None:
        lines.append(f"{'  ' * depth}{span.name}  [{span.service}, {span.seconds * 1000:.1f} ms]")
        for child in spans:
            if child.parent == span.id:
                add(child, depth + 1)

    for span in spans:
        if span.parent not in ids:
            add(span, 0)
    return lines


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector that listens."""
    server, made = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(made.points), server)  # type: ignore[no-untyped-call]
    made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(None)
