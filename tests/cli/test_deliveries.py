"""`deliveries list` shows why a delivery is parked; `replay` and `discard` say what becomes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import System, Tidings
from tidings.notifications.v1 import notifications_pb2

_REPLAY, _DISCARD = notifications_pb2.ReplayDeliveriesRequest, notifications_pb2.DiscardDeliveriesRequest


@pytest.fixture(autouse=True)
def two_deliveries(system: System) -> None:
    """One is pending, the other parked."""
    attempt = notifications_pb2.Delivery.Attempt(
        number=1, outcome=notifications_pb2.Delivery.Attempt.REFUSED, code=550, detail="no such\nmailbox"
    )
    system.inbox.deliveries = [
        notifications_pb2.Delivery(id="1", channel="email", target="a@b", state=notifications_pb2.Delivery.PENDING),
        notifications_pb2.Delivery(
            id="2", channel="email", target="c@d", state=notifications_pb2.Delivery.PARKED, attempts=[attempt]
        ),
    ]


async def test_the_list_says_why(tidings: Tidings) -> None:
    ran = await tidings("deliveries", "list", "--state", "parked")
    assert ran.out.splitlines()[1].split() == [
        "parked", "email", "c@d", "1", "refused", "550", "no", "such\\nmailbox", "2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "kind", "done"), [("replay", _REPLAY, "replayed"), ("discard", _DISCARD, "discarded")]
)
async def test_by_ids(system: System, tidings: Tidings, verb: str, kind: Any, done: str) -> None:
    ran = await tidings("deliveries", verb, "2", "--reason", "so")
    assert (ran.code, ran.out, ran.err) == (0, f"1 {done}\n", "")
    ran = await tidings("deliveries", verb, "2", "--json")
    assert json.loads(ran.out) == {done: 1}
    assert system.inbox.changes == [kind(ids=["2"], reason="so"), kind(ids=["2"])]


@pytest.mark.parametrize("verb", ["replay", "discard"])
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["2", "3"], 4, "no such delivery: 3"),
        (["1"], 5, "not parked: 1"),
        ([], 2, "give ids, or --all-parked"),
        (["2", "--all-parked"], 2, "give ids, or --all-parked"),
        (["2", "--channel", "email"], 2, "go with --all-parked"),
    ],
)
async def test_refusals(tidings: Tidings, verb: str, arguments: list[str], code: int, message: str) -> None:
    ran = await tidings("deliveries", verb, *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err


async def test_all_is_asked_for_first(system: System, tidings: Tidings) -> None:
    for stdin in (b"", b"n\n"):
        ran = await tidings("deliveries", "discard", "--all-parked", stdin=stdin)
        assert (ran.code, ran.out) == (2, "")
        assert "Discard 1 delivery? They cannot be tried again. [y/N]" in ran.err
        assert "nothing is changed" in ran.err
    assert not system.inbox.changes
    ran = await tidings("deliveries", "replay", "--all-parked", "--channel", "email", stdin=b"y\n")
    assert (ran.code, ran.out) == (0, "2 replayed\n")
    assert (await tidings("deliveries", "discard", "--all-parked", "--user", "u", "--yes", "--json")).out == (
        '{"discarded":2}\n'
    )
    assert system.inbox.changes == [
        _REPLAY(filter=_REPLAY.Filter(channel="email")),
        _DISCARD(filter=_DISCARD.Filter(user_id="u")),
    ]


async def test_explain(system: System, tidings: Tidings) -> None:
    step = notifications_pb2.ExplainDeliveryResponse.Step
    sent = step(
        kind=step.ATTEMPT,
        verdict="FAILED",
        code=451,
        detail="attempt 1: later",
        name="smtp",
        channel="email",
        target="a@b",
    )
    sent.time.FromJsonString("2026-01-31T12:00:00Z")
    system.inbox.steps = [
        step(kind=step.RULE, verdict="OTHER_TYPE", name="goodbye", detail="it is about\nDELETED"),
        sent,
    ]
    ran = await tidings("deliveries", "explain", "--notification", "known")
    assert [line.split() for line in ran.out.splitlines()[1:]] == [
        ["rule", "OTHER_TYPE", "goodbye", "it", "is", "about\\nDELETED"],
        ["2026-01-31", "12:00:00Z", "attempt", "FAILED", "451", "email", "a@b", "attempt", "1:", "later", "(smtp)"],
    ]
    ran = await tidings("deliveries", "explain", "--event", "known", "--user", "ada", "--json")
    assert [json.loads(line)["verdict"] for line in ran.out.splitlines()] == ["OTHER_TYPE", "FAILED"]
    assert (await tidings("deliveries", "explain", "--notification", "other")).code == 4


@pytest.mark.parametrize("arguments", [[], ["--event", "1", "--notification", "2"], ["--event", "1", "--send", "2"]])
async def test_one_thing_is_explained(tidings: Tidings, arguments: list[str]) -> None:
    ran = await tidings("deliveries", "explain", *arguments)
    assert (ran.code, ran.err) == (2, "error: exactly one of --event, --send and --notification is required\n")
