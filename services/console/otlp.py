"""Takes spans by OTLP over gRPC: the TraceService of opentelemetry-proto, for this machine only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from console.spans import Link, Span, SpanEvent, SpanStore
from servicekit import logs

log = logs.get(__name__)

_OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20))
_MOST_ATTRIBUTES, _MOST_LINKS, _MOST_EVENTS = 64, 128, 32
_LONGEST_TEXT = 1000


class TraceService(trace_service_pb2_grpc.TraceServiceServicer):
    """Puts what it is sent into a store."""

    def __init__(self, store: SpanStore) -> None:
        self._store = store

    async def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes all of it."""
        self._store.add(spans_of(request))
        return trace_service_pb2.ExportTraceServiceResponse()


def receiver(address: str, store: SpanStore) -> grpc.aio.Server | None:
    """A server on an address, not started; None if the address cannot be had."""
    server = grpc.aio.server(options=_OPTIONS)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(TraceService(store), server)  # type: ignore[no-untyped-call]
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        log.error("address is taken or not allowed", address=address)
        return None
    return server


def spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[Span]:
    """The spans of an export that have ids; long texts are cut."""
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes).get("service.name", "unknown")
        for scope in resource.scope_spans:
            for one in scope.spans:
                if len(one.trace_id) == 16 and len(one.span_id) == 8:
                    yield _span(service, one)


def _span(service: str, one: trace_pb2.Span) -> Span:
    return Span(
        trace_id=one.trace_id.hex(),
        span_id=one.span_id.hex(),
        parent_id=one.parent_span_id.hex(),
        service=service,
        name=one.name[:_LONGEST_TEXT],
        kind=trace_pb2.Span.SpanKind.Name(one.kind).removeprefix("SPAN_KIND_"),
        start=one.start_time_unix_nano,
        end=max(one.end_time_unix_nano, one.start_time_unix_nano),
        failed=one.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=one.status.message[:_LONGEST_TEXT],
        attributes=_attributes(one.attributes),
        links=tuple(Link(link.trace_id.hex(), link.span_id.hex()) for link in one.links[:_MOST_LINKS]),
        events=tuple(
            SpanEvent(event.name[:_LONGEST_TEXT], event.time_unix_nano, _attributes(event.attributes))
            for event in one.events[:_MOST_EVENTS]
        ),
        size=one.ByteSize(),
    )


def _attributes(given: Iterable[common_pb2.KeyValue]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        if len(found) == _MOST_ATTRIBUTES:
            break
        found[one.key[:_LONGEST_TEXT]] = _text(one.value)[:_LONGEST_TEXT]
    return found


def _text(value: common_pb2.AnyValue) -> str:
    match value.WhichOneof("value"):
        case None:
            return ""
        case "array_value":
            return ", ".join(_text(one) for one in value.array_value.values)
        case "kvlist_value":
            return ", ".join(f"{one.key}={_text(one.value)}" for one in value.kvlist_value.values)
        case "bytes_value":
            return value.bytes_value.hex()
        case "bool_value":
            return "true" if value.bool_value else "false"
        case kind:
            return str(getattr(value, kind))
