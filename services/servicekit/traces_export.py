"""The part of tracing that takes OpenTelemetry's SDK: from spans to an exporter."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace import sampling as samplers
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from servicekit import telemetry

_LONGEST_FLUSH = 2.0


@contextmanager
def exporting(name: str, resource: Resource) -> Iterator[None]:
    """Exports spans by the exporter of a name; flushes them at its end, for at most 2 s."""
    exporter = _exporter(name)
    provider = TracerProvider(
        sampler=_Forced(samplers._get_from_env_or_default()), resource=resource, shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # A collector that does not answer must not hold up the end.
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(_LONGEST_FLUSH)


def _exporter(name: str) -> SpanExporter:
    if name == "console":
        return ConsoleSpanExporter()
    # Not needed by whoever prints them.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class _Forced(Sampler):
    """Samples what is asked for by `sampled`; leaves the rest to the sampler of the process."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if parent_context is not None and parent_context.get(telemetry.SAMPLED):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._sampler.should_sample(parent_context, trace_id, name, kind, attributes, links)

    def get_description(self) -> str:
        return self._sampler.get_description()
