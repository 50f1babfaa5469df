"""A run of the migrations says at its end whether it succeeded, and is never the worse for it."""

from __future__ import annotations

import socket

from tests.harness import Collector, Databases, free_port
from tests.migrations.commands import command_line, migrate

SUCCEEDED = "tidings.migration.succeeded"


async def test_success_and_failure_are_pushed(databases: Databases, collector: Collector) -> None:
    telemetry = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    made = await databases.blank("users")
    assert (await migrate("users", made, **telemetry)).code == 0
    assert [(one.service, one.name, one.attributes, one.value) for one in collector.points] == [
        ("tidings-migrations", SUCCEEDED, {"tidings.database": "users"}, 1)
    ]
    # Of one database there is none, the other is not reached.
    nowhere = f"postgresql://127.0.0.1:{free_port()}/none"
    urls = {"TIDINGS_USERS_DATABASE_URL": made.url, "TIDINGS_NOTIFICATIONS_DATABASE_URL": nowhere}
    run = await command_line("upgrade", "all", TIDINGS_MIGRATIONS_CONNECT_WAIT="0", **urls, **telemetry)
    assert run.code == 1
    assert collector.last(SUCCEEDED, tidings_database="users") == 1
    assert collector.last(SUCCEEDED, tidings_database="notifications") == 0
    # Other commands say nothing.
    pushed = len(collector.points)
    assert (await migrate("users", made, "current", "users", **telemetry)).code == 0
    assert len(collector.points) == pushed


async def test_a_push_that_fails_fails_nothing(databases: Databases) -> None:
    made = await databases.blank("users")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert (await migrate("users", made, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)).code == 0
    run = await migrate("users", made, OTEL_METRICS_EXPORTER="carrier pigeon")
    assert run.code == 0
    assert "metrics cannot be pushed" in run.output
