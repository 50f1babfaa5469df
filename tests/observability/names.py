"""The series that queries may name, by what exposes them."""

from __future__ import annotations

from collections.abc import Iterator

import migrations.metrics
import notification_service.metrics
import servicekit.metrics
import user_service.metrics
from servicekit.instruments import Instrument

MEASURED: tuple[Instrument, ...] = (
    *servicekit.metrics.INSTRUMENTS,
    *user_service.metrics.INSTRUMENTS,
    *notification_service.metrics.INSTRUMENTS,
    *migrations.metrics.INSTRUMENTS,
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


def exposed() -> Iterator[str]:
    """The names of ours as Prometheus has them."""
    for one in MEASURED:
        parts = ("_bucket", "_count", "_sum") if one.kind == "histogram" else ("",)
        yield from (f"{one.prometheus_name}{part}" for part in parts)


def known() -> set[str]:
    """All of them, but for what the rules record."""
    return {*exposed(), *POSTGRES, *COLLECTOR, *PROCESS, *PROMETHEUS}
