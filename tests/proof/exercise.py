"""Which faults hit work in flight. A run whose faults struck an idle system proves nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from tests.proof.history import History, Stream
from tests.proof.records import Fault
from tests.proof.streams import settled

ALL_REPLICAS = -1

# What is not done by the run's plan but comes of it.
UNSURE_ANSWER = "answer lost, same request asked again"
CUT_STREAM = "stream cut by its reader"
RESUMED_ELSEWHERE = "resume on another replica"
RESUMED_IN_GROUP = "resume after a cut inside a group"
DERIVED = (UNSURE_ANSWER, CUT_STREAM, RESUMED_ELSEWHERE, RESUMED_IN_GROUP)


@dataclass(slots=True)
class Tally:
    """How often a kind of fault happened, and how often it hit work in flight."""

    kind: str
    times: int = 0
    hits: int = 0


def tallies(history: History, kinds: tuple[str, ...]) -> list[Tally]:
    """The tally of each planned kind, and of what came of them."""
    found = {kind: Tally(kind) for kind in (*kinds, *DERIVED)}
    calls = _open_calls(history)
    for fault in history.faults:
        tally = found.setdefault(fault.kind, Tally(fault.kind))
        tally.times += 1
        tally.hits += _in_flight(calls, fault) if fault.hit is None else fault.hit
    _count_answers(history, found[UNSURE_ANSWER])
    for streams in history.sessions.values():
        _count_resumes(streams, found)
    return list(found.values())


def _open_calls(history: History) -> dict[int, list[tuple[float, float]]]:
    """When calls of writers were open, by replica and begin."""
    calls: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for change in history.changes.values():
        for attempt, outcome in change.attempts:
            span = attempt.at, outcome.at if outcome else float("inf")
            calls[attempt.replica].append(span)
            calls[ALL_REPLICAS].append(span)
    for spans in calls.values():
        spans.sort()
    return calls


# No call of a writer is open for longer.
_LONGEST_CALL = 60.0


def _in_flight(calls: dict[int, list[tuple[float, float]]], fault: Fault) -> bool:
    spans = calls[fault.replica]
    before = bisect_left(spans, (fault.at,))
    after = bisect_left(spans, (fault.at - _LONGEST_CALL,))
    return any(end > fault.at for _, end in spans[after:before])


def _count_answers(history: History, tally: Tally) -> None:
    for change in history.changes.values():
        unsure = sum(outcome is not None and outcome.result == "unsure" for _, outcome in change.attempts)
        tally.times += unsure
        tally.hits += unsure if settled(change) else 0


def _count_resumes(streams: list[Stream], found: dict[str, Tally]) -> None:
    for before, after in pairwise(streams):
        closed = before.closed
        if after.opened.start != "token" or not before.messages or closed is None:
            continue
        if (closed.by, closed.reason) == ("reader", "cut"):
            found[CUT_STREAM].times += 1
            found[CUT_STREAM].hits += bool(after.messages)
        if before.opened.replica != after.opened.replica:
            found[RESUMED_ELSEWHERE].times += 1
            found[RESUMED_ELSEWHERE].hits += bool(after.messages)
        last = before.messages[-1]
        if last.events and not last.token:
            found[RESUMED_IN_GROUP].times += 1
            found[RESUMED_IN_GROUP].hits += bool(after.messages)
