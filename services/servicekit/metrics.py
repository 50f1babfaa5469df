"""What every server measures of itself, and the set-up that lets others see what a process measures.

Metrics are pushed by OTLP if an endpoint is configured (`OTEL_EXPORTER_OTLP_ENDPOINT` or its metrics variant) or
`OTEL_METRICS_EXPORTER` names an exporter, and served to Prometheus at an address of the settings. The SDK's variables
hold: intervals, limits, the resource, temporality; but histograms always have the buckets that are declared. Without
either, what is counted is seen by nobody, and what takes a query or a loop of its own is not measured.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import psycopg

from servicekit import logs, telemetry
from servicekit.database import Pool
from servicekit.instruments import Gauge, Histogram, Instrument, Values

log = logs.get(__name__)

RPC_DURATION = Histogram(
    "rpc.server.call.duration",
    "s",
    "Calls and how long they took; a stream counts when it has ended.",
    "rpc.system.name",
    "rpc.method",
    "rpc.response.status_code",
)
ACTIVE_STREAMS = Gauge("tidings.rpc.server.active_streams", "{stream}", "Streams that are open.", "rpc.method")
LOOP_DELAY = Histogram(
    "tidings.event_loop.delay", "s", "How much later than asked for the event loop woke a task, ten times a second."
)
BACKGROUND_ALIVE = Gauge("tidings.background.alive", "1", "Whether a background task runs: 1, or 0.", "task")
READY = Gauge("tidings.ready", "1", "Whether readiness is SERVING: 1, or 0.")
_POOL = "db.client.connection.pool.name"
POOL_CONNECTIONS = Gauge(
    "db.client.connection.count",
    "{connection}",
    "Connections of a pool, `used` or `idle`.",
    _POOL,
    "db.client.connection.state",
)
POOL_MAX = Gauge("db.client.connection.max", "{connection}", "Connections that a pool may have.", _POOL)
POOL_PENDING = Gauge(
    "db.client.connection.pending_requests", "{request}", "Who waits for a connection of a pool.", _POOL
)

INSTRUMENTS: tuple[Instrument, ...] = (
    RPC_DURATION,
    ACTIVE_STREAMS,
    LOOP_DELAY,
    BACKGROUND_ALIVE,
    READY,
    POOL_CONNECTIONS,
    POOL_MAX,
    POOL_PENDING,
)

_LOOK = 0.1  # seconds
# What is asked of a database takes at most this share of a loop's time, however much there is to count.
_SHARE = 0.05

_seen = False


def seen() -> bool:
    """Whether anybody can see what this process measures."""
    return _seen


# The set-up


@contextmanager
def measuring(service: str, address: str, instruments: Sequence[Instrument]) -> Iterator[None]:
    """Lets a process's instruments, and those of every server, be seen for as long as it is open; pushes them a last
    time at its end. `address` is where Prometheus finds them, nowhere if empty: if it cannot be had the process ends
    with exit code 1. Raises InvalidConfigError.
    """
    global _seen
    exporter = telemetry.known_exporter("METRICS")
    if exporter == "none" and not address:
        yield
        return
    # Takes a tenth of a service's start, for nothing where nobody looks.
    from servicekit import metrics_export

    host, _, port = address.rpartition(":")
    where = (host.strip("[]"), int(port)) if address else None
    exporting = metrics_export.exporting(
        telemetry.resource(service), (*INSTRUMENTS, *instruments), exporter=exporter, address=where
    )
    with ExitStack() as stack:
        try:
            bound = stack.enter_context(exporting)
        except OSError as error:
            log.error("metrics address is taken or not allowed", address=address, error=error.strerror)
            raise SystemExit(1) from None
        if address:
            log.info("metrics are served", address=f"{host}:{bound}", path="/metrics")
        _seen = True
        try:
            yield
        finally:
            _seen = False


def push_once(service: str, instruments: Sequence[Instrument], timeout: float) -> None:
    """Pushes instruments of a process that is about to end, if there is somewhere to push them to. Gives up after so
    many seconds; raises nothing.
    """
    try:
        exporter = telemetry.known_exporter("METRICS")
        if exporter != "none":
            from servicekit import metrics_export

            metrics_export.push_once(telemetry.resource(service), instruments, exporter, timeout)
    except (Exception, KeyboardInterrupt) as error:
        log.warning("metrics cannot be pushed", error=str(error) or type(error).__name__)


# What is measured


def calls_of(method: str) -> Callable[[str, float], None]:
    """What notes the end of a call of a method: by the name of its status, and when it began by `time.perf_counter`."""
    tallies = {"OK": RPC_DURATION.of("grpc", method, "OK")}

    def ended(code: str, began: float) -> None:
        tally = tallies.get(code)
        if tally is None:
            tally = tallies[code] = RPC_DURATION.of("grpc", method, code)
        tally.record(time.perf_counter() - began)

    return ended


_streams: Counts[Values] = Counts()
ACTIVE_STREAMS.read = lambda: list(_streams.items())


def streams_changed(method: str, more: int) -> None:
    """So many more streams of a method are open, or fewer."""
    _streams[(method,)] += more


def read_process(tasks: Callable[[], Mapping[str, bool]], is_ready: Callable[[], bool]) -> None:
    """Has the background tasks and the readiness looked at."""
    BACKGROUND_ALIVE.read = lambda: [((name,), int(alive)) for name, alive in list(tasks().items())]
    READY.read_one(lambda: int(is_ready()))


def read_pools(*pools: Pool) -> None:
    """Has pools looked at."""

    def stats() -> Iterable[tuple[str, Mapping[str, int]]]:
        return [(pool.name, pool.get_stats()) for pool in pools]

    POOL_CONNECTIONS.read = lambda: [
        series
        for name, of in stats()
        for series in (
            ((name, "used"), of["pool_size"] - of["pool_available"]),
            ((name, "idle"), of["pool_available"]),
        )
    ]
    POOL_MAX.read = lambda: [((name,), of["pool_max"]) for name, of in stats()]
    POOL_PENDING.read = lambda: [((name,), of.get("requests_waiting", 0)) for name, of in stats()]


async def measure_loop() -> None:
    """A background loop: how late the event loop is."""
    tally = LOOP_DELAY.of()
    while True:
        # The loop's own clock stands still while a task runs.
        due = time.perf_counter() + _LOOK
        await asyncio.sleep(_LOOK)
        tally.record(max(time.perf_counter() - due, 0.0))


async def refresh(look: Callable[[], Awaitable[None]], interval: float) -> None:
    """A background loop: looks at a database at most every `interval` seconds, less often if that takes long."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        try:
            await look()
        except psycopg.Error as error:
            log.warning("metrics: the database cannot be asked", error=str(error).strip())
        except Exception:
            # Not worth the process.
            log.exception("metrics: a look failed")
        await asyncio.sleep(max(interval, (loop.time() - began) / _SHARE))
