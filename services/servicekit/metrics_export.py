"""Hands a process's instruments to who asks: by OTLP at intervals, and to Prometheus over HTTP.

The OpenTelemetry SDK has what is observed (gauges, counters), the resource and the exporters. Histograms are counted
before the SDK sees them, which has no instrument for that: its readers add them to what they collect.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality as Temporality
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from servicekit import logs
from servicekit.instruments import Counter, Gauge, Histogram, Instrument, Values

log = logs.get(__name__)

_SCOPE = "tidings"
_LONGEST_LAST_PUSH = 2.0  # seconds


class _Histograms:
    """The histograms of a process as one reader sees them: since the start, or since it last looked (`delta`)."""

    def __init__(self, instruments: Sequence[Instrument], *, delta: bool = False) -> None:
        self._instruments = [one for one in instruments if isinstance(one, Histogram)]
        self._temporality = Temporality.DELTA if delta else Temporality.CUMULATIVE
        self._since = time.time_ns()
        self._before: dict[tuple[str, Values], tuple[list[int], float]] = {}

    def added_to(self, data: sdk.MetricsData) -> sdk.MetricsData:
        """What a reader has collected, with the histograms."""
        now = time.time_ns()
        made = [self._metric(one, now) for one in self._instruments]
        if self._temporality is Temporality.DELTA:
            self._since = now
        # A scope of their own, for exporters keep one of two that are equal.
        scope = sdk.ScopeMetrics(
            InstrumentationScope(f"{_SCOPE}.histograms"), [one for one in made if one.data.data_points], ""
        )
        first, *others = data.resource_metrics
        first = sdk.ResourceMetrics(first.resource, [*first.scope_metrics, scope], first.schema_url)
        return sdk.MetricsData([first, *others])

    def _metric(self, histogram: Histogram, now: int) -> sdk.Metric:
        points = []
        for values, tally in histogram.series():
            counts, total = tally.counts[:], tally.sum
            if self._temporality is Temporality.DELTA:
                key = (histogram.name, values)
                before, total_before = self._before.get(key, ([0] * len(counts), 0.0))
                self._before[key] = (counts, total)
                counts = [now_ - then for now_, then in zip(counts, before, strict=True)]
                total -= total_before
            points.append(
                sdk.HistogramDataPoint(
                    attributes=dict(zip(histogram.attributes, values, strict=True)),
                    start_time_unix_nano=self._since,
                    time_unix_nano=now,
                    count=sum(counts),
                    sum=total,
                    bucket_counts=counts,
                    explicit_bounds=histogram.bounds,
                    # Not kept; OTLP lets them be absent.
                    min=None,  # type: ignore[arg-type]
                    max=None,  # type: ignore[arg-type]
                )
            )
        return sdk.Metric(
            histogram.name, histogram.description, histogram.unit, sdk.Histogram(points, self._temporality)
        )


class _Scraped(PrometheusMetricReader):
    def __init__(self, instruments: Sequence[Instrument], registry: CollectorRegistry) -> None:
        super().__init__(scope_info_enabled=False, registry=registry)
        self._histograms = _Histograms(instruments)

    def _receive_metrics(self, metrics_data: sdk.MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        super()._receive_metrics(self._histograms.added_to(metrics_data), timeout_millis, **kwargs)


class _Pushed(sdk.PeriodicExportingMetricReader):
    def __init__(self, instruments: Sequence[Instrument], exporter: sdk.MetricExporter, **options: float) -> None:
        preference = os.environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "").lower()
        self._histograms = _Histograms(instruments, delta=preference in ("delta", "lowmemory"))
        super().__init__(exporter, **options)

    def _receive_metrics(self, metrics_data: sdk.MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        super()._receive_metrics(self._histograms.added_to(metrics_data), timeout_millis, **kwargs)


def _observed(provider: MeterProvider, instruments: Sequence[Instrument]) -> None:
    """Lets the SDK ask gauges and counters."""
    meter = provider.get_meter(_SCOPE)
    for one in instruments:
        if isinstance(one, Gauge):
            callback = _callback(one, lambda gauge=one: gauge.read())  # type: ignore[misc] # bound now, set later
            meter.create_observable_gauge(one.name, [callback], one.unit, one.description)
        elif isinstance(one, Counter):
            callback = _callback(one, lambda counter=one: [(key, it.value) for key, it in counter.series()])  # type: ignore[misc]
            meter.create_observable_counter(one.name, [callback], one.unit, one.description)


def _callback(instrument: Instrument, read: Callable[[], Any]) -> Callable[[CallbackOptions], Iterator[Observation]]:
    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for values, number in read():
            yield Observation(number, dict(zip(instrument.attributes, values, strict=True)))

    return observe


def _exporter(name: str, timeout: float | None = None) -> sdk.MetricExporter:
    if name == "console":
        return sdk.ConsoleMetricExporter()
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter(timeout=timeout)


@contextmanager
def exporting(
    resource: Resource, instruments: Sequence[Instrument], *, exporter: str, address: tuple[str, int] | None
) -> Iterator[int | None]:
    """Exports for as long as it is open, by an exporter (`otlp`, `console`, `none`) and at an address. Yields the port
    that Prometheus finds them at. Raises OSError if the address cannot be had.
    """
    registry = CollectorRegistry()
    readers: list[sdk.MetricReader] = []
    with ExitStack() as stack:
        port = None
        if address is not None:
            port = stack.enter_context(_served(registry, *address))
            ProcessCollector(registry=registry)
            readers.append(_Scraped(instruments, registry))
        if exporter != "none":
            readers.append(_Pushed(instruments, _exporter(exporter)))
        provider = MeterProvider(readers, resource, shutdown_on_exit=False)
        _observed(provider, instruments)
        stack.callback(_bounded, provider.shutdown, _LONGEST_LAST_PUSH)
        yield port


@contextmanager
def _served(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    server, thread = start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def push_once(resource: Resource, instruments: Sequence[Instrument], exporter: str, timeout: float) -> None:
    """Exports once, for a process that is about to end; gives up after so many seconds."""

    def push() -> None:
        try:
            reader = _Pushed(instruments, _exporter(exporter, timeout), export_interval_millis=float("inf"))
            provider = MeterProvider([reader], resource, shutdown_on_exit=False)
            _observed(provider, instruments)
            provider.force_flush(int(timeout * 1000))
        except Exception as error:
            log.warning("metrics cannot be pushed", error=str(error))

    _bounded(push, timeout)


def _bounded(act: Callable[[], None], timeout: float) -> None:
    """Does something for so many seconds at most: a collector that does not answer must not hold up the end. What is
    still under way then ends with the process.
    """
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(timeout)
