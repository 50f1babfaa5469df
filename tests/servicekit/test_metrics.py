"""Instruments and their export, without a service; documents that say what there is; addresses that cannot be had."""

from __future__ import annotations

import asyncio
import re
import socket
import time
import urllib.request

import pytest
from opentelemetry.sdk.resources import Resource

from servicekit import metrics
from servicekit.configfile import InvalidConfigError
from servicekit.instruments import Counter, Gauge, Histogram, Instrument
from servicekit.metrics_export import exporting
from servicekit.settings import InvalidSettingsError, load
from tests.harness import Collector, Databases, Services
from tests.harness.metrics import parsed
from tools import metrics_table
from user_service.settings import UserServiceSettings

ALL = [one for _, instruments in metrics_table._TABLES for one in instruments]


def test_the_document_has_the_instruments_of_the_code() -> None:
    written = metrics_table.DOCUMENT.read_text()
    assert metrics_table.document(written) == written, "run: make docs-metrics"
    assert [one.name for one in ALL] == re.findall(r"^\| `([\w.]+)`<br>", written, re.MULTILINE)


def test_every_name_is_one_instrument() -> None:
    assert len({one.name for one in ALL}) == len({one.prometheus_name for one in ALL}) == len(ALL)


def copies() -> list[Instrument]:
    """Instruments that are declared alike, each with one measurement."""
    made: list[Instrument] = []
    for one in ALL:
        values = tuple(f"a value of {key}" for key in one.attributes)
        if isinstance(one, Histogram):
            histogram = Histogram(one.name, one.unit, one.description, *one.attributes, bounds=one.bounds)
            histogram.of(*values).record(0.003)
            made.append(histogram)
        elif isinstance(one, Counter):
            counter = Counter(one.name, one.unit, one.description, *one.attributes)
            counter.of(*values).add(7)
            made.append(counter)
        else:
            gauge = Gauge(one.name, one.unit, one.description, *one.attributes)
            gauge.read = lambda values=values: [(values, 7)]  # type: ignore[misc]
            made.append(gauge)
    return made


def test_prometheus_has_the_names_that_are_documented() -> None:
    made = copies()
    with exporting(Resource({}), made, exporter="none", address=("127.0.0.1", 0)) as port:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    served = parsed(text)
    # The parser has counters' names without their suffix.
    assert served.types == {one.prometheus_name.removesuffix("_total"): one.kind for one in made}
    for one in made:
        suffix = "_count" if isinstance(one, Histogram) else ""
        [sample] = served.all(one.prometheus_name + suffix)
        assert sample.labels == {key.replace(".", "_"): f"a value of {key}" for key in one.attributes}
        assert sample.value == (1 if isinstance(one, Histogram) else 7)


def test_a_histogram_counts_a_bound_below_it() -> None:
    histogram = Histogram("h", "s", "", bounds=(1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 300.0):
        histogram.of().record(value)
    with exporting(Resource({}), [histogram, present()], exporter="none", address=("127.0.0.1", 0)) as port:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    served = parsed(text)
    assert [(one.labels["le"], one.value) for one in served.all("h_seconds_bucket")] == [
        ("1.0", 2), ("2.0", 4), ("+Inf", 6),
    ]  # fmt: skip
    assert served.value("h_seconds_sum") == 307.5


def present() -> Gauge:
    """A gauge that is always there, as readiness is."""
    gauge = Gauge("present", "1", "")
    gauge.read_one(lambda: 1)
    return gauge


def test_a_series_has_the_attributes_that_are_declared() -> None:
    counter = Counter("c", "1", "", "lane")
    for values in ((), ("calls", "crm")):
        with pytest.raises(TypeError):
            counter.of(*values)
    assert counter.series() == []


@pytest.mark.parametrize("preference", ["cumulative", "delta"])
async def test_what_is_pushed_is_what_was_measured(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, preference: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    histogram, counter = Histogram("h", "s", "", "lane"), Counter("c", "1", "", "lane")

    def measure() -> None:
        with exporting(Resource({}), [histogram, counter, present()], exporter="otlp", address=None):
            for number in (1, 2, 3):
                pushed = len(collector.points)
                histogram.of("calls").record(number)
                counter.of("calls").add(number)
                while len(collector.points) < pushed + 6:
                    time.sleep(0.01)

    # Its threads are answered by this one.
    async with asyncio.timeout(30):
        await asyncio.to_thread(measure)
    of = {name: [point for point in collector.points if point.name == name] for name in ("h", "c")}
    assert {point.is_delta for points in of.values() for point in points} == {preference == "delta"}
    if preference == "delta":
        assert (sum(one.value for one in of["h"]), sum(one.sum for one in of["h"])) == (3, 6.0)
        assert sum(one.value for one in of["c"]) == 6
    else:
        assert (of["h"][-1].value, of["h"][-1].sum, of["c"][-1].value) == (3, 6.0, 6)


def test_nobody_is_served_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with metrics.measuring("test", "", ()):
        assert not metrics.seen()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, "OTEL_METRICS_EXPORTER: must be otlp, console or none"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL: must be grpc",
        ),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidConfigError) as caught, metrics.measuring("test", "", ()):
        pass
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", ":9464", "::1:9464", "127.0.0.1:65536", "127.0.0.1:http"])
def test_a_wrong_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidSettingsError) as caught:
        load(UserServiceSettings, database_url="postgresql://", metrics_address=address)
    assert str(caught.value).startswith("TIDINGS_USERS_METRICS_ADDRESS: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("address", ["", "127.0.0.1:9464", "0.0.0.0:0", "[::1]:9464", "localhost:1"])
def test_a_right_address_is_taken(address: str) -> None:
    assert load(UserServiceSettings, database_url="postgresql://", metrics_address=address).metrics_address == address


async def test_an_address_that_is_taken_ends_the_service(databases: Databases, services: Services) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = services.users(await databases.users(), metrics_address=address)
        await process.launch()
        assert await process.wait() == 1
    errors = [record for record in process.records if record["level"] == "error"]
    assert [(one["event"], one["address"]) for one in errors] == [("metrics address is taken or not allowed", address)]
    assert not [line for line in process.lines if "Traceback" in line]
