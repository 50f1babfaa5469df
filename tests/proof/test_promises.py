"""Each check passes an honest run, and fails for a run that was doctored to break its promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.journal import Journal
from tests.proof.exercise import CUT_STREAM, RESUMED_ELSEWHERE, RESUMED_IN_GROUP, UNSURE_ANSWER, tallies
from tests.proof.history import gather
from tests.proof.promises import CHECKS, judge
from tests.proof.records import (
    Attempt,
    Calm,
    Closed,
    Event,
    Fault,
    Head,
    Intent,
    Message,
    Opened,
    Outcome,
    Record,
    Row,
    State,
    Stuck,
    read,
)

Records = list[Record]


def _user(name: str, version: int = 1, tag: str = "", team: str = "red", *, living: bool = True) -> State:
    user_id = f"00000000-0000-0000-0000-{int(name, 36):012x}"
    return State(user_id, version, f"{name} {version}", tag or name, {"team": team}, living)


def _event(position: int, type_: str, user: State, previous: str | None = None, **changes: object) -> Event:
    fields = ["labels"] if type_ == "UPDATED" else []
    return Event(position, f"event {position}", type_, user, position * 1000, fields, False, previous)._replace(
        **changes
    )


A, B1, B2, B3 = (_user(name) for name in ("a", "b1", "b2", "b3"))
A2 = _user("a", 2, "c", "blue")
B1X = _user("b1", 2, "b1", living=False)
LOG = [
    _event(1, "CREATED", A),
    _event(2, "CREATED", B1),
    _event(3, "CREATED", B2),
    _event(4, "CREATED", B3),
    _event(5, "UPDATED", A2),
    _event(6, "DELETED", B1X),
]
SNAPSHOT = [_event(4, "SNAPSHOT", user, id="") for user in (A, B1, B2, B3)]


def _ask(
    op: str, at: float, outcome: Outcome, *, method: str = "CreateUser", user_id: str = "", **more: object
) -> Records:
    tags = {"UpdateUser": [op], "CreateUser": [op], "BatchCreateUsers": ["b1", "b2", "b3"]}.get(method, [])
    intent = Intent(op, method, at, tags, user_id)._replace(**more)
    return [intent, Attempt(op, 0, at + 0.1), outcome]


def _stream(
    name: str, at: float, start: str, *messages: Message, token: str = "", reason: str = "finished", replica: int = 0
) -> Records:
    opened = Opened(name, name.partition("/")[0], replica, at, start, token, 1.0, 2000, None, False)
    numbered = [message._replace(stream=name, at=at + 0.1 * number) for number, message in enumerate(messages, 1)]
    return [opened, *numbered, Closed(name, at + 20, "reader", "", reason, 0)]


def _message(previous: int, position: int, *, token: bool = True, mark: str = "", told: int = 0) -> Message:
    events = LOG[previous:position]
    return Message("", 0, 200, previous, position, f"token {position}" if token else "", mark, told, events)


def _begin(position: int) -> Message:
    return _message(position, position, mark="bookmark", told=6)


def _honest() -> Records:
    """A run in which every promise was kept."""
    inside = _message(4, 4)._replace(token="token in snapshot")
    bookmarks = [_begin(6)._replace(stream="idle/1", at=100.0 + second) for second in range(8)]
    return [
        *_ask("a", 1, Outcome("a", 2, "done", "", [A])),
        *_ask("b", 3, Outcome("b", 4, "done", "", [B1, B2, B3]), method="BatchCreateUsers"),
        *_ask("c", 5, Outcome("c", 6, "unsure", "UNAVAILABLE", []), method="UpdateUser", user_id=A.id),
        Attempt("c", 1, 6.1),
        Outcome("c", 6.2, "done", "", [A2]),
        *_ask("d", 7, Outcome("d", 8, "done", "", [B1X]), method="DeleteUser", user_id=B1.id),
        *_ask("e", 9, Outcome("e", 10, "refused", "USERNAME_TAKEN", [])),
        *_ask("f", 9, Outcome("f", 10, "done", "", [_user("f")]), stores=False),
        *_stream(
            "one/1", 10, "earliest", _begin(0), _message(0, 1), _message(1, 3, token=False), _message(3, 4),
            _message(4, 6), _message(6, 6, mark="caught_up", told=6),
        ),
        *_stream("two/1", 11, "earliest", _begin(0), _message(0, 1), _message(1, 3, token=False), reason="cut"),
        *_stream("two/2", 32, "token", _begin(1), _message(1, 4), _message(4, 6), token="token 1", replica=1),
        *_stream("since/1", 12, "since", _begin(1), _message(1, 4), _message(4, 6)),
        *_stream("now/1", 13, "now", _begin(6)),
        *_stream(
            "snap/1", 14, "snapshot", _begin(4), _message(4, 4, mark="snapshot_begin", told=4),
            inside._replace(events=SNAPSHOT[:2]), inside._replace(events=SNAPSHOT[2:]),
            _message(4, 4, mark="snapshot_end", told=4), _message(4, 6),
        ),
        *_red("pick/1", _event(1, "CREATED", A), LOG[1:4], _event(5, "UPDATED", A2, left_filter=True)),
        Opened("forged/1", "forged", 0, 50, "forged", "token of another log", 1.0, 0, None, True),
        Closed("forged/1", 51, "server", "FAILED_PRECONDITION", "FOREIGN_TOKEN", 0),
        Opened("idle/1", "idle", 0, 99, "now", "", 1.0, 0, None, False),
        *bookmarks,
        Closed("idle/1", 108, "reader", "", "finished", 0),
        Calm(101, 107.5),
        Stuck(0, 10, 100, 2, 200, 1 << 20, 2 << 20),
        *(Row(user) for user in (A2, B2, B3)),
        Head(1, 6),
    ]  # fmt: skip


def _red(name: str, first: Event, group: list[Event], left: Event) -> Records:
    """A stream that selects the red team: the update of A is its leaving."""
    records = _stream(
        name, 15, "earliest", _begin(0), _message(0, 1)._replace(events=[first]), _message(1, 4)._replace(events=group),
        _message(4, 6)._replace(events=[left, LOG[5]]),
    )  # fmt: skip
    assert isinstance(records[0], Opened)
    return [records[0]._replace(selection={"labels": {"team": "red"}}), *records[1:]]


def _broken(records: Records) -> dict[str, list[str]]:
    return {verdict.promise: verdict.examples for verdict in judge(gather(records)) if verdict.broken}


def test_an_honest_run_passes_every_check() -> None:
    verdicts = judge(gather(_honest()))
    assert {verdict.promise: verdict.examples for verdict in verdicts if verdict.broken} == {}
    assert all(verdict.checked for verdict in verdicts)
    assert [verdict.promise for verdict in verdicts] == list(CHECKS)


# The promises that are broken, how, and what does it to the records of an honest run.


def _in_message(stream: str, number: int, change: Callable[[Message], Message]) -> Callable[[Records], Records]:
    """Changes the message of a stream with that number."""

    def doctor(records: Records) -> Records:
        places = [
            place for place, record in enumerate(records) if isinstance(record, Message) and record.stream == stream
        ]
        changed = records[places[number]]
        assert isinstance(changed, Message)
        return [*records[: places[number]], change(changed), *records[places[number] + 1 :]]

    return doctor


def _events(stream: str, number: int, change: Callable[[list[Event]], list[Event]]) -> Callable[[Records], Records]:
    return _in_message(stream, number, lambda message: message._replace(events=change(list(message.events))))


def _replaced(old: Record, *new: Record) -> Callable[[Records], Records]:
    def doctor(records: Records) -> Records:
        assert old in records
        place = records.index(old)
        return [*records[:place], *new, *records[place + 1 :]]

    return doctor


def _everywhere(position: int, **changes: object) -> Callable[[Records], Records]:
    """Changes an event in every message, as if it were so in the log."""

    def event(one: Event) -> Event:
        return one._replace(**changes) if one.position == position and one.type != "SNAPSHOT" else one

    def doctor(records: Records) -> Records:
        return [
            record._replace(events=[event(one) for one in record.events]) if isinstance(record, Message) else record
            for record in records
        ]

    return doctor


def _without(kind: type, **fields: object) -> Callable[[Records], Records]:
    def gone(record: Record) -> bool:
        return isinstance(record, kind) and all(getattr(record, name) == value for name, value in fields.items())

    def doctor(records: Records) -> Records:
        left = [record for record in records if not gone(record)]
        assert len(left) < len(records)
        return left

    return doctor


DOCTORED: list[tuple[str, str, Callable[[Records], Records]]] = [
    ("Ordered", "two events are swapped", _events("one/1", 4, lambda events: events[::-1])),
    ("Ordered", "commit_time falls", _everywhere(5, time_ns=1)),
    ("Ordered Honest Snapshot", "a version is skipped", _everywhere(5, user=A2._replace(version=3))),
    ("Ordered", "what was answered before has a higher position", _replaced(
        Attempt("c", 0, 5.1), Attempt("c", 0, 8.5))),
    ("Complete", "an event is left out", _events("one/1", 4, lambda events: events[1:])),
    ("Complete", "a message is left out", _without(Message, stream="one/1", position=3)),
    ("Complete", "a selected event is left out", _events("pick/1", 3, lambda events: events[1:])),
    ("Complete", "left_filter is missing", _events("pick/1", 3, lambda events: [LOG[4], events[1]])),
    ("Complete", "the stream ended with an error", _replaced(
        Closed("one/1", 30, "reader", "", "finished", 0), Closed("one/1", 30, "server", "INTERNAL", "", 0))),
    ("Complete", "a session never came to the head", _replaced(
        Closed("one/1", 30, "reader", "", "finished", 0), Closed("one/1", 30, "reader", "", "unfinished", 0))),
    ("Complete", "nobody received the last position", _replaced(Head(1, 6), Head(1, 7))),
    ("Complete", "since begins too early", _replaced(
        Opened("since/1", "since", 0, 12, "since", "", 1.0, 2000, None, False),
        Opened("since/1", "since", 0, 12, "since", "", 1.0, 2001, None, False))),
    ("Complete", "now begins before what was acknowledged", _in_message(
        "now/1", 0, lambda message: message._replace(previous_position=5, position=5))),
    ("Unique", "an event is sent twice", _events("one/1", 4, lambda events: [events[0], *events])),
    ("Unique", "an event is sent again after a resume", _events("two/2", 1, lambda events: [LOG[0], *events])),
    ("Unique", "an event has two positions", _everywhere(6, id="event 5")),
    ("Atomic", "a token stands inside a group", _in_message(
        "one/1", 2, lambda message: message._replace(token="token 3"))),
    ("Atomic", "a message is too large", _in_message("one/1", 2, lambda message: message._replace(size=1 << 20))),
    ("Honest Snapshot", "an event was never asked for", _everywhere(
        5, user=A2._replace(tag="nobody's"))),
    ("Honest", "a refused change is sent", _replaced(
        Outcome("d", 8, "done", "", [B1X]), Outcome("d", 8, "refused", "STALE_VERSION", []))),
    ("Honest", "two streams differ", _events(
        "one/1", 4, lambda events: [events[0]._replace(id="another"), events[1]])),
    ("Honest", "an acknowledged change is not sent", _replaced(
        Outcome("e", 10, "refused", "USERNAME_TAKEN", []), Outcome("e", 10, "done", "", [_user("e")]))),
    ("Honest", "the answer is not what was sent", _replaced(
        Outcome("a", 2, "done", "", [A]), Outcome("a", 2, "done", "", [A._replace(digest="other")]))),
    ("Honest", "one request has two answers", _replaced(
        Outcome("c", 6, "unsure", "UNAVAILABLE", []), Outcome("c", 6, "done", "", [A]))),
    ("Honest Snapshot", "the table lacks a user", _without(Row, user=B2)),
    ("Honest", "the table has a user more", _replaced(Head(1, 6), Row(_user("ghost", living=False)), Head(1, 6))),
    ("Honest", "`previous` is another state", _events(
        "one/1", 4, lambda events: [events[0]._replace(previous="other"), events[1]])),
    ("Resumable Atomic Complete", "resumes one position too far", _in_message(
        "two/2", 0, lambda message: message._replace(previous_position=1, position=2))),
    ("Resumable", "a good token is refused", lambda records: [
        *records,
        Opened("bad/1", "bad", 1, 60, "token", "token 4", 1.0, 0, None, False),
        Closed("bad/1", 61, "server", "FAILED_PRECONDITION", "DIVERGED_TOKEN", 0)]),
    ("Resumable", "a token has expired that is retained", lambda records: [
        *records,
        Opened("bad/1", "bad", 1, 60, "token", "token 4", 1.0, 0, None, False),
        Closed("bad/1", 61, "server", "OUT_OF_RANGE", "POSITION_EXPIRED", 3)]),
    ("Resumable", "a forged token is accepted", lambda records: [
        *records, _begin(4)._replace(stream="forged/1", at=50.5)]),
    ("Bookmarked", "a stream begins with a mark of another kind", _in_message(
        "one/1", 0, lambda message: message._replace(mark="caught_up"))),
    ("Bookmarked", "the first message has no token", _in_message(
        "now/1", 0, lambda message: message._replace(token=""))),
    ("Bookmarked", "an idle stream offers no token", lambda records: [
        record for record in records
        if not (isinstance(record, Message) and record.stream == "idle/1" and 102 <= record.at < 107)]),
    ("Fair", "others were delayed", _replaced(
        Stuck(0, 10, 100, 2, 200, 1 << 20, 2 << 20), Stuck(0, 10, 100, 2, 150, 1 << 20, 2 << 20))),
    ("Fair", "memory grew", _replaced(
        Stuck(0, 10, 100, 2, 200, 1 << 20, 2 << 20), Stuck(0, 10, 100, 2, 200, 3 << 20, 2 << 20))),
    ("Snapshot", "a user is not named", _events("snap/1", 3, lambda events: events[1:])),
    ("Snapshot", "a user is named twice", _events("snap/1", 3, lambda events: [SNAPSHOT[0], *events])),
    ("Snapshot", "a user is named as somebody else", _events(
        "snap/1", 3, lambda events: [events[0]._replace(user=B2._replace(digest="other")), *events[1:]])),
    ("Snapshot", "a state stands at another position", _events(
        "snap/1", 3, lambda events: [events[0]._replace(position=3), *events[1:]])),
]  # fmt: skip


@pytest.mark.parametrize(("promises", "doctor"), [case[::2] for case in DOCTORED], ids=[case[1] for case in DOCTORED])
def test_a_doctored_run_breaks_its_promise(promises: str, doctor: Callable[[Records], Records]) -> None:
    """The promise by whose name it goes, and those that cannot be kept without it."""
    assert _broken(doctor(_honest())).keys() == set(promises.split())


def test_a_group_that_is_not_whole_is_broken() -> None:
    """The third user of the batch is nowhere."""
    doctored = [
        record._replace(tags=["b1", "b2", "b3", "b4"]) if isinstance(record, Intent) and record.op == "b" else record
        for record in _honest()
    ]
    assert _broken(doctored).keys() == {"Atomic"}


def test_of_what_was_removed_before_anybody_received_it_nothing_is_said() -> None:
    """The first events are in no stream; the feed begins after them."""
    records = [
        record._replace(events=[event for event in record.events if event.position > 3])
        if isinstance(record, Message) and record.stream == "now/2"
        else record
        for record in _honest()
        if not (isinstance(record, Opened | Message | Closed))
    ]
    later = _stream("now/2", 16, "earliest", _begin(3), _message(3, 6))
    history = gather([*(record for record in records if not isinstance(record, Head)), *later, Head(4, 6)])
    assert history.unseen == 3
    assert {verdict.promise: verdict.examples for verdict in judge(history) if verdict.broken} == {}


def test_an_unknown_outcome_may_have_happened_once_but_not_twice() -> None:
    unknown = _replaced(Outcome("d", 8, "done", "", [B1X]), Outcome("d", 8, "unsure", "UNAVAILABLE", []))(_honest())
    assert _broken(unknown) == {}
    again = _user("a", 3, "c", "blue")
    twice = [
        record._replace(events=[*record.events, _event(7, "UPDATED", again)], position=7)
        if isinstance(record, Message) and record.stream == "one/1" and record.events and record.position == 6
        else record
        for record in unknown
    ]
    assert "c happened more often than it was asked for, at [5, 7]" in _broken(twice)["Honest"]


def test_faults_count_as_hits_only_with_work_in_flight() -> None:
    records: Records = [
        *_honest(),
        Fault("killed", 0, 1.5, 2.5),
        Fault("killed", 1, 1.5, 2.5),
        Fault("killed", -1, 7.5, 8.5),
        Fault("cut", 0, 2.5, 2.6, hit=True),
        Fault("cut", 0, 2.5, 2.6, hit=False),
    ]
    counted = {tally.kind: (tally.times, tally.hits) for tally in tallies(gather(records), ("killed", "cut", "never"))}
    assert counted == {
        "killed": (3, 2),
        "cut": (2, 1),
        "never": (0, 0),
        UNSURE_ANSWER: (1, 1),
        CUT_STREAM: (1, 1),
        RESUMED_ELSEWHERE: (1, 1),
        RESUMED_IN_GROUP: (1, 1),
    }


async def test_records_come_back_from_a_journal_as_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    records = _honest()
    await journal.sure(*records[:5])
    for record in records[5:]:
        journal.note(record)
    journal.close()
    with (tmp_path / "run.jsonl").open("ab") as file:
        file.write(b'["Head",1')  # cut off by a kill
    assert list(read(tmp_path)) == records
