"""`doctor` names what is wrong and what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from tests.cli.conftest import NOW, Ran, System, Tidings
from tests.harness import Database, Databases, Services
from tidings.cli.looks import State
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2


def states(ran: Ran) -> dict[str, str]:
    """Each check's state."""
    return {finding["check"]: finding["state"] for finding in map(json.loads, ran.out.splitlines())}


@pytest.fixture
async def one_change(system: System) -> None:
    """A change that is processed."""
    await system.directory.store(users_pb2.User(id="id", username="ada"), users_pb2.UserEvent.CREATED)
    system.inbox.inbox.position = 1


async def test_a_healthy_system(tidings: Tidings, one_change: None) -> None:
    ran = await tidings("doctor")
    assert (ran.code, ran.err) == (0, "")
    assert [line.split()[0] for line in ran.out.splitlines()] == ["ok"] * 5
    assert "every change is processed, up to 1" in ran.out


async def test_what_is_wrong_is_said(system: System, tidings: Tidings, one_change: None) -> None:
    inbox = system.inbox.inbox
    inbox.position, inbox.parked = 0, 2
    ran = await tidings("doctor", "--json")
    assert ran.code == 1
    assert states(ran) == {
        "user service": State.OK,
        "notification service": State.OK,
        "feed": State.OK,
        "subscription": State.ILL,
        "deliveries": State.ATTENTION,
    }
    assert "stands still at 0, 1 changes behind" in ran.out
    for command in ("list --state parked", "replay --all-parked", "discard ID"):
        assert f"`tidings deliveries {command}`" in ran.out


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (notifications_pb2.Inbox(log_id="other"), "subscription", "follows the log of another"),
        (notifications_pb2.Inbox(log_id="log", position=5), "subscription", "beyond the feed's head 1"),
        (notifications_pb2.Inbox(log_id="log", position=1, oldest_pending_time=NOW), "deliveries", "overdue by"),
    ],
)
async def test_findings(
    system: System, tidings: Tidings, one_change: None, change: notifications_pb2.Inbox, check: str, message: str
) -> None:
    system.inbox.inbox = change
    ran = await tidings("doctor", "--json")
    assert ran.code == 1
    assert states(ran)[check] == State.ILL
    assert message in ran.out


@dataclass(frozen=True)
class Shard:
    """What a shard's row says, `quiet` seconds after it was written."""

    index: int
    position: int
    owner: str = "replica"
    lag: int = 0
    quiet: float = 0.0

    def told(self) -> notifications_pb2.Inbox.Shard:
        """As it is told now: parameters of tests are made long before."""
        time = datetime.now(UTC) - timedelta(seconds=self.quiet)
        return notifications_pb2.Inbox.Shard(
            index=self.index, position=self.position, owner=self.owner, lag_events=self.lag, update_time=time
        )


@pytest.mark.parametrize(
    ("shards", "still"),
    [
        # One that has no news of its own is no further than its last bookmark.
        ([Shard(0, 0), Shard(1, 1)], ""),
        ([Shard(0, 0, lag=1), Shard(1, 1)], "0 at 0"),
        ([Shard(0, 0, owner=""), Shard(1, 0)], "0 at 0, which nobody follows"),
        ([Shard(0, 1), Shard(1, 0, quiet=400)], "1 at 0"),
    ],
)
async def test_a_feed_in_shards(
    system: System, tidings: Tidings, one_change: None, shards: list[Shard], still: str
) -> None:
    inbox = system.inbox.inbox
    inbox.position = 0
    inbox.shards.extend(one.told() for one in shards)
    ran = await tidings("doctor", "--json")
    assert (ran.code, states(ran)["subscription"]) == ((1, State.ILL) if still else (0, State.OK))
    said = (
        f"of 2 shards some stand still: {still}"
        if still
        else "2 shards are followed, every change is processed up to 0"
    )
    assert said in ran.out


async def test_services_that_are_away_or_not_ready(system: System, tidings: Tidings) -> None:
    await system.set_health("readiness")
    ran = await tidings("doctor", "--notifications", "127.0.0.1:1")
    assert ran.code == 1
    assert f"user service: runs at {system.address} but is not ready" in ran.out
    assert "notification service: cannot be reached at 127.0.0.1:1" in ran.out


@pytest.mark.parametrize(
    ("off", "reason", "message", "advice"),
    [
        ("liveness", "the loop tailer is stuck", "hangs: the loop tailer is stuck", "restart it"),
        ("startup", "waiting for the schema 0004: schema is at 0003", "has not started: waiting", "migrations upgrade"),
        (
            "startup",
            "waiting for the schema 0004: the database is not reachable",
            "not reachable",
            "bring the database",
        ),
        ("balancing", "stopping", "is stopping", "wait for its successor"),
        ("readiness", "the database does not answer", "is not ready: the database", "bring the database back"),
        ("readiness", "the loop tailer does not go round", "is not ready: the loop", "pg_stat_activity"),
        ("readiness", "the log has a hole", "is not ready: the log", "docs/operations.md"),
        ("readiness", "the user feed cannot be followed: POSITION_EXPIRED", "POSITION_EXPIRED", "reset-cursor"),
        ("readiness", "the user service does not let this one in: X", "not let this one in", "USERS_TOKEN_FILE"),
        ("readiness", "", "but is not ready", "its log says"),
    ],
)
async def test_health_that_is_off(
    system: System, tidings: Tidings, off: str, reason: str, message: str, advice: str
) -> None:
    await system.set_health(off, reason=reason)
    ran = await tidings("doctor", "--json")
    assert ran.code == 1
    first = json.loads(ran.out.splitlines()[0])
    assert (first["check"], first["state"]) == ("user service", State.ILL)
    assert message in first["message"]
    assert advice in first["advice"]


async def test_what_is_said_besides(system: System, tidings: Tidings, one_change: None) -> None:
    now = datetime.now(UTC)
    await system.set_health(schema="0007", time=now.isoformat(), notes="local,no-callers,default-sender")
    ran = await tidings("doctor", "--json")
    assert set(states(ran).values()) == {State.OK}
    assert f"ready at {system.address}, on schema 0007" in ran.out
    assert "right for this machine alone: everybody may call, and nobody has a name; mail comes from" in ran.out

    await system.set_health(time=(now - timedelta(minutes=3)).isoformat(), notes="no-tls,no-telemetry")
    ran = await tidings("doctor")
    assert ran.code == 0
    assert "the clock of the user service is 1" in ran.out
    assert "s behind this machine's" in ran.out
    for words in ("it speaks without TLS", "_TLS_CERTIFICATE_FILE", "no traces", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        assert ran.out.count(words) == 2
    assert {line.split()[0] for line in ran.out.splitlines() if "clock" in line and "->" not in line} == {"attention"}


async def test_a_service_at_the_address_of_the_other(
    services: Services, users_database: Database, tidings: Tidings
) -> None:
    users = await services.users(users_database).start()
    ran = await tidings("doctor", "--users", users.address, "--notifications", users.address)
    assert ran.code == 1
    assert f"user service: ready at {users.address}, on schema 0" in ran.out
    assert f"notification service: what answers at {users.address} is another service" in ran.out
    assert "settings of the user service: right for this machine alone" in ran.out
    assert "clock" not in ran.out


async def test_a_service_that_waits_for_its_schema(services: Services, databases: Databases, tidings: Tidings) -> None:
    service = services.users(await databases.blank("users"))
    await service.launch()
    address = (await service.wait_log("listening"))["address"]
    await service.wait_log("waiting for the schema")
    ran = await tidings("doctor", "--users", address)
    assert ran.code == 1
    assert f"user service: runs at {address} but has not started: waiting for the schema" in ran.out
    assert "run the migrations" in ran.out
