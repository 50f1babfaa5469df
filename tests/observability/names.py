"""The series that queries may name, by what exposes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from opentelemetry.exporter.prometheus._mapping import map_unit, sanitize_full_name

Kind = Literal["gauge", "counter", "histogram"]

# Of the services and the migrations: name, unit, kind.
MEASURED: tuple[tuple[str, str, Kind], ...] = (
    ("rpc.server.call.duration", "s", "histogram"),
    ("tidings.rpc.server.active_streams", "", "gauge"),
    ("tidings.event_loop.delay", "s", "histogram"),
    ("tidings.background.alive", "", "gauge"),
    ("tidings.ready", "", "gauge"),
    ("db.client.connection.count", "", "gauge"),
    ("db.client.connection.max", "", "gauge"),
    ("db.client.connection.pending_requests", "", "gauge"),
    ("tidings.commit.batch.size", "", "histogram"),
    ("tidings.commit.wait", "s", "histogram"),
    ("tidings.commit.duration", "s", "histogram"),
    ("tidings.commit.queue", "", "gauge"),
    ("tidings.feed.head", "", "gauge"),
    ("tidings.feed.earliest", "", "gauge"),
    ("tidings.feed.window.events", "", "gauge"),
    ("tidings.feed.window.bytes", "By", "gauge"),
    ("tidings.feed.subscribers", "", "gauge"),
    ("tidings.feed.commit_to_sent", "s", "histogram"),
    ("tidings.feed.subscriber.lag.events", "", "gauge"),
    ("tidings.feed.subscriber.lag.time", "s", "gauge"),
    ("messaging.client.sent.messages", "", "counter"),
    ("messaging.client.consumed.messages", "", "counter"),
    ("messaging.process.duration", "s", "histogram"),
    ("tidings.feed.commit_to_processed", "s", "histogram"),
    ("tidings.inbox.position", "", "gauge"),
    ("tidings.inbox.lag.events", "", "gauge"),
    ("tidings.inbox.lag.time", "s", "gauge"),
    ("tidings.delivery.attempts", "", "counter"),
    ("tidings.delivery.duration", "s", "histogram"),
    ("tidings.delivery.commit_to_delivered", "s", "histogram"),
    ("tidings.deliveries.pending", "", "gauge"),
    ("tidings.deliveries.parked", "", "gauge"),
    ("tidings.deliveries.oldest_pending_age", "s", "gauge"),
    ("tidings.migration.succeeded", "", "gauge"),
)
# postgres_exporter's own, alike in 0.11 (Debian 12) and 0.20 (the manifests), and those of postgres-queries.yaml.
POSTGRES = {
    "pg_up",
    "pg_database_size_bytes",
    "pg_locks_count",
    "pg_settings_max_connections",
    "pg_stat_activity_count",
    "pg_stat_activity_max_tx_duration",
    "pg_stat_database_blks_hit",
    "pg_stat_database_blks_read",
    "pg_stat_database_deadlocks",
    "pg_stat_database_temp_bytes",
    "pg_stat_database_tup_deleted",
    "pg_stat_database_tup_inserted",
    "pg_stat_database_tup_updated",
    "pg_stat_database_xact_commit",
    "pg_stat_database_xact_rollback",
    "pg_oldest_snapshot_seconds",
    "pg_oldest_snapshot_transactions",
}
# The collector's own, without suffixes of units and types, as its configuration has it:
# https://opentelemetry.io/docs/collector/internal-telemetry/
COLLECTOR = {
    "otelcol_exporter_send_failed_spans",
    "otelcol_exporter_sent_spans",
    "otelcol_receiver_accepted_spans",
}
# Of every process, by Prometheus' client library, and of every target, by Prometheus.
PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
PROMETHEUS = {"up"}

_PARTS: dict[Kind, tuple[str, ...]] = {
    "gauge": ("",),
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
}


def exposed() -> Iterator[str]:
    """The names of ours as Prometheus has them."""
    for name, unit, kind in MEASURED:
        base, suffix = sanitize_full_name(name), map_unit(unit)
        if suffix and not base.endswith(f"_{suffix}"):
            base = f"{base}_{suffix}"
        yield from (f"{base}{part}" for part in _PARTS[kind])


def known() -> set[str]:
    """All of them, but for what the rules record."""
    return {*exposed(), *POSTGRES, *COLLECTOR, *PROCESS, *PROMETHEUS}
