"""The checks on an honest history that is then doctored: each doctoring breaks its promise, and that one alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.delivery_faults import expected
from tests.delivery_faults.evidence import (
    AWAY,
    KILLED,
    PAUSED,
    Attempt,
    Bounds,
    Change,
    Deed,
    Delivery,
    Event,
    Evidence,
    Notification,
    Operation,
)  # fmt: skip
from tests.delivery_faults.promises import (
    BY_KILL,
    BY_OUTAGE,
    BY_PAUSE,
    NOT_ANSWERED,
    NOT_READ,
    causes,
    judge,
)  # fmt: skip
from tests.harness.bad import Received

_USER = "0198c0de-0000-7000-8000-000000000001"
_ENDPOINTS = {name: f"http://127.0.0.1:1/{name}" for name in expected.ENDPOINTS}


def _received(delivery: Delivery, at: float, *, accepted: bool = True, answered: bool = True) -> Received:
    target = "/" + delivery.target.rpartition("/")[2] if delivery.channel == "webhook" else delivery.target
    content = delivery.key.encode()
    return Received("server", delivery.key, target, content, 1, at, accepted, at + 0.01 if answered else 0.0)


def _honest() -> Evidence:
    """A user that is created and twice updated; everything is delivered at once, one second after the other."""
    made = Evidence(Bounds(timeout=1.5, lease=3.0, parked_holds=frozenset({"email"})), dict(_ENDPOINTS))
    address = "ada@example.com"
    for number, kind in enumerate(("CREATED", "UPDATED", "UPDATED"), 1):
        event_id = f"0198c0de-0000-7000-8000-00000000010{number}"
        fields = frozenset({"display_name"}) if number > 1 else frozenset()
        made.events.append(Event(number, event_id, kind, _USER, number, address, address, fields))
        made.changes.append(Change(_USER, number))
    for event in made.events:
        for one in expected.made_of(event, expected.rules(), made.endpoints):
            position = len(made.notifications) + 1
            made.notifications.append(Notification(one.id, position, event.id, event.position, _USER, one.rule))
            for wanted in one.deliveries:
                _deliver(made, wanted)
    return made


def _deliver(made: Evidence, wanted: expected.Wanted) -> None:
    position = len(made.deliveries) + 1
    begun = 1000.0 + 10 * position
    made.deliveries.append(
        Delivery(
            wanted.id, position, wanted.notification_id, _USER, wanted.channel, wanted.target, "DELIVERED", "",
            begun + 0.2, wanted.key, 1,
        )
    )  # fmt: skip
    made.attempts.append(Attempt(wanted.id, 1, "SUCCEEDED", 200, begun, begun + 0.2))
    made.received.append(_received(made.deliveries[-1], begun + 0.1))


def _broken(evidence: Evidence) -> set[str]:
    return {verdict.promise for verdict in judge(evidence) if verdict.broken}


def test_an_honest_history_breaks_nothing() -> None:
    made = _honest()
    assert _broken(made) == set()
    assert len(made.deliveries) == 8
    unchecked = {verdict.promise for verdict in judge(made) if not verdict.checked}
    assert unchecked == {"Same", "Excused"}  # nothing arrived twice


Doctor = Callable[[Evidence], object]


def _delivery(made: Evidence, index: int, **changes: object) -> None:
    made.deliveries[index] = made.deliveries[index]._replace(**changes)


def _twice(made: Evidence, index: int = 0, **changes: object) -> None:
    made.received.append(replace(made.received[index], at=made.received[index].at + 5, **changes))


def _swap_positions(made: Evidence) -> None:
    """The last two deliveries to `everything` exchange their times."""
    last, before = [index for index, one in enumerate(made.deliveries) if one.target == _ENDPOINTS["everything"]][:0:-1]
    made.received[last].at, made.received[before].at = made.received[before].at, made.received[last].at
    for index in (last, before):
        _delivery(made, index, end=2000.0)


@pytest.mark.parametrize(
    ("promise", "doctor"),
    [
        ("Ended", lambda made: _delivery(made, 0, state="PENDING", end=0.0)),
        ("Ended", lambda made: _delivery(made, 0, state="PARKED")),
        ("Ended", lambda made: _delivery(made, 0, state="CANCELLED")),
        ("Ended", lambda made: _delivery(made, 0, state="DISCARDED", end_reason="DISCARDED_BY_HAND")),
        ("Ended", lambda made: _delivery(made, 0, tries=2)),
        ("Ended", lambda made: made.attempts.__setitem__(0, made.attempts[0]._replace(outcome="FAILED"))),
        ("Ended", lambda made: _delivery(made, 0, state="PARKED", end_reason="REFUSED", end=0.0)),
        ("Complete", lambda made: made.changes.append(Change(_USER, 4))),
        ("Complete", lambda made: made.events.append(made.events[0]._replace(id=str(_USER), position=4, version=4))),
        ("Complete", lambda made: made.events.pop()),
        ("Complete", lambda made: _delivery(made, 0, target="bob@example.com")),
        ("Known", lambda made: made.received.pop()),
        ("Known", lambda made: setattr(made.received[0], "accepted", False)),
        ("Known", lambda made: _delivery(made, 0, end=1.0)),
        ("Known", lambda made: setattr(made.received[0], "target", "bob@example.com")),
        ("Known", lambda made: made.received.append(replace(made.received[0], key="other", accepted=False))),
        ("Same", lambda made: _twice(made, content=b"other", accepted=False)),
        ("Excused", _twice),
        ("Ordered", _swap_positions),
        ("Dense", lambda made: _delivery(made, 7, position=9)),
        ("Dense", lambda made: made.notifications.__setitem__(0, made.notifications[0]._replace(position=2))),
    ],
)
def test_a_doctored_history_breaks_its_promise(promise: str, doctor: Doctor) -> None:
    made = _honest()
    doctor(made)
    assert promise in _broken(made)


def _attempts(made: Evidence, *attempts: tuple[str, float, float]) -> None:
    """The attempts at the first delivery: outcome, start and end after the beginning."""
    identity, begun = made.deliveries[0].id, made.attempts[0].start
    rows = [
        Attempt(identity, number, outcome, 0, begun + start, begun + end if end else 0.0)
        for number, (outcome, start, end) in enumerate(attempts, 1)
    ]
    made.attempts[:1] = rows
    _delivery(made, 0, tries=len(rows), end=begun + 9)


def _deed(made: Evidence, what: str, start: float, end: float) -> None:
    begun = made.attempts[0].start
    made.deeds.append(Deed("fault", what, begun + start, begun + end, True))


@pytest.mark.parametrize(
    ("cause", "answered", "attempts", "deed"),
    [
        (NOT_ANSWERED, False, [("FAILED", 0, 0.2), ("SUCCEEDED", 5, 5.2)], None),
        (NOT_READ, True, [("FAILED", 0, 1.5), ("SUCCEEDED", 5, 5.2)], None),
        (BY_KILL, True, [("UNKNOWN", 0, 0), ("SUCCEEDED", 5, 5.2)], (KILLED, 0.1, 0.2)),
        (BY_PAUSE, True, [("UNKNOWN", 0, 0), ("SUCCEEDED", 5, 5.2)], (PAUSED, 0.1, 4.0)),
        (BY_PAUSE, True, [("UNKNOWN", -5, 0), ("SUCCEEDED", 0, 0.2)], (PAUSED, -4.9, 5.0)),
        (BY_OUTAGE, True, [("UNKNOWN", 0, 0), ("SUCCEEDED", 5, 5.2)], (AWAY, 0.1, 4.0)),
        (None, True, [("UNKNOWN", 0, 0), ("SUCCEEDED", 5, 5.2)], None),
        (None, True, [("UNKNOWN", 0, 0), ("SUCCEEDED", 5, 5.2)], (KILLED, 30.0, 31.0)),
        (None, True, [("FAILED", 0, 0.2), ("SUCCEEDED", 5, 5.2)], (KILLED, 0.1, 0.2)),
        (None, True, [("SUCCEEDED", 0, 0.2)], (PAUSED, 20.0, 24.0)),
    ],
)
def test_what_excuses_a_duplicate(
    cause: str | None, answered: bool, attempts: list[tuple[str, float, float]], deed: tuple[str, float, float] | None
) -> None:
    made = _honest()
    if deed:
        _deed(made, *deed)
    _attempts(made, *attempts)
    made.received[0].answer_time *= answered
    _twice(made)
    assert [name for name, count in causes(made).items() if count] == ([cause] if cause else [])
    assert _broken(made) == (set() if cause else {"Excused"})


def test_who_has_ended_may_be_passed() -> None:
    made = _honest()
    _swap_positions(made)
    last, before = [index for index, one in enumerate(made.deliveries) if one.target == _ENDPOINTS["everything"]][:0:-1]
    passed = made.deliveries[before]
    assert _broken(made) == {"Ordered"}
    # Webhooks that are parked hold nobody back: this one was, and was replayed after the other had passed.
    parked = copy.deepcopy(made)
    start = made.received[last].at
    parked.attempts += [Attempt(passed.id, 2, "SUCCEEDED", 200, start + 50, start + 51)]
    parked.attempts[before] = Attempt(passed.id, 1, "REFUSED", 404, start - 2, start - 1)
    parked.deliveries[before] = passed._replace(tries=2)
    parked.operations.append(Operation(passed.id, "REPLAYED", start + 40))
    assert _broken(parked) == set()
    # So it was if it is parked to this day, and came late from who had been paused.
    late = copy.deepcopy(made)
    late.deliveries[before] = passed._replace(state="PARKED", end_reason="REFUSED", end=start - 1)
    assert _broken(late) == set()
    # Where they do hold others back it is as bad as ever.
    held = replace(parked, bounds=replace(parked.bounds, parked_holds=frozenset({"email", "webhook"})))
    assert _broken(held) == {"Ordered"}
