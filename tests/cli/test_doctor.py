"""`doctor` names what is wrong and what to do."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import NOW, Ran, System, Tidings
from tidings.cli import doctor
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

State = doctor.State


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


async def test_services_that_are_away_or_not_ready(system: System, tidings: Tidings) -> None:
    await system.set_ready(False)
    ran = await tidings("doctor", "--notifications", "127.0.0.1:1")
    assert ran.code == 1
    assert f"user service: runs at {system.address} but is not ready" in ran.out
    assert "notification service: cannot be reached at 127.0.0.1:1" in ran.out
