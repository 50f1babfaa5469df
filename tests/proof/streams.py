"""The promises that a stream keeps by itself: Ordered, Complete, Unique, Atomic, Resumable, Bookmarked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.proof.history import Change, History, Stream
from tests.proof.records import Calm, Event, Message
from tests.proof.selection import leaves, selects_event
from tests.proof.verdict import Verdict

_LARGEST_MESSAGE = 1 << 20
# A stream may end so; its session goes on with the last token. CANCELLED is a stream that did not take its drain.
GOES_ON = {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"}
# What a token may be late by while nothing is done to anybody: processes share the machine with others.
_LATE = 3.0


def _messages(history: History) -> Iterator[tuple[Stream, Message]]:
    for stream in history.streams.values():
        for message in stream.messages:
            yield stream, message


def _changes(message: Message) -> list[Event]:
    """The events that are changes; those of a snapshot are states."""
    if message.events and message.events[0].type == "SNAPSHOT":
        return []
    return message.events


def ordered(history: History) -> Verdict:
    """Positions rise and follow the order of commits; a user's versions rise by one; commit_time never falls."""
    verdict = Verdict("Ordered")
    for stream in history.streams.values():
        name, last, time, versions = stream.opened.stream, 0, 0, dict[str, int]()
        all_of_a_user = not (stream.opened.selection or {}).keys() & {"labels", "types", "changed_fields"}
        for message in stream.messages:
            for event in _changes(message):
                verdict.checked += 1
                if event.position < last:
                    verdict.breaks(f"{name}: position {event.position} comes after {last}")
                if event.time_ns < time:
                    verdict.breaks(f"{name}: commit_time falls at position {event.position}")
                user = event.user
                known = versions.get(user.id)
                if all_of_a_user and event.position > last and known is not None and user.version != known + 1:
                    verdict.breaks(f"{name}: version {user.version} of user {user.id} follows {known}")
                last, time, versions[user.id] = event.position, event.time_ns, user.version
    _commit_order(history, verdict)
    return verdict


def _commit_order(history: History, verdict: Verdict) -> None:
    """What was answered before another was asked for has the lower position."""
    spans = [
        (position, change.attempts[0][0].at, outcome.at if (outcome := change.done) else None, change.intent.op)
        for op, positions in history.made.items()
        for change in [history.changes[op]]
        for position in positions
    ]
    latest, latest_op = 0.0, ""
    for position, asked, answered, op in sorted(spans):
        if answered is not None:
            verdict.checked += 1
            if latest > answered:
                verdict.breaks(f"{op} at position {position} was answered before {latest_op}, which is below, began")
        if asked > latest:
            latest, latest_op = asked, op


def complete(history: History) -> Verdict:
    """Positions are dense; between two tokens of a stream every event that it selects is sent."""
    verdict = Verdict("Complete")
    for position in range(max(history.base, history.head.earliest - 1) + 1, history.head.head + 1):
        verdict.checked += 1
        if position not in history.log:
            verdict.breaks(f"position {position} was received by nobody")
    acknowledged = _acknowledged(history)
    for stream in history.streams.values():
        if stream.messages:
            _check_start(history, stream, acknowledged, verdict)
            _check_chain(history, stream, verdict)
        closed = stream.closed
        if closed is None or stream.opened.start == "forged":
            continue
        if closed.by == "server" and stream.messages and not _may_end_so(closed.code, closed.reason):
            verdict.breaks(f"{closed.stream}: ended with {closed.code} {closed.reason}")
        if closed.by == "reader" and closed.reason == "unfinished":
            verdict.breaks(f"{closed.stream}: session {stream.opened.session} never came to the head")
    return verdict


def _acknowledged(history: History) -> Callable[[float], int]:
    """The highest position that somebody had been told of at a time."""
    told: list[tuple[float, int]] = []
    highest = 0
    done = [
        (change.done.at, max(history.made.get(op, [0])))
        for op, change in history.changes.items()
        if change.done is not None
    ]
    for at, position in sorted(done):
        highest = max(highest, position)
        told.append((at, highest))

    def at_time(at: float) -> int:
        low, high = 0, len(told)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if told[middle][0] < at else (low, middle)
        return told[low - 1][1] if low else 0

    return at_time


def _check_start(history: History, stream: Stream, acknowledged: Callable[[float], int], verdict: Verdict) -> None:
    opened, begins = stream.opened, stream.messages[0].position
    verdict.checked += 1
    if opened.start == "earliest" and begins + 1 > max(history.head.earliest, history.base + 1):
        verdict.breaks(f"{opened.stream}: from the earliest begins after {begins}")
    if opened.start == "now" and begins < acknowledged(opened.at):
        verdict.breaks(f"{opened.stream}: from now begins at {begins}, although later ones were acknowledged")
    if opened.start == "since":
        last, first = history.log.get(begins), history.log.get(begins + 1)
        if last and last.time_ns >= opened.since_ns:
            verdict.breaks(f"{opened.stream}: begins after {begins}, which is not before {opened.since_ns}")
        if first and first.time_ns < opened.since_ns:
            verdict.breaks(f"{opened.stream}: begins with {begins + 1}, which is before {opened.since_ns}")


def _check_chain(history: History, stream: Stream, verdict: Verdict) -> None:
    name, selection = stream.opened.stream, stream.opened.selection
    last = stream.messages[0].previous_position
    for message in stream.messages:
        if message.previous_position != last:
            verdict.breaks(f"{name}: a message says it follows {message.previous_position}, the one before was {last}")
        last = message.position
        events = _changes(message)
        got = {event.position for event in events}
        expected = set(range(message.previous_position + 1, message.position + 1))
        if selection is not None:
            expected = {
                position
                for position in expected
                if position in history.log
                and selects_event(selection, history.log[position], history.before.get(position))
            }
        verdict.checked += len(expected)
        for position in sorted(expected - got):
            verdict.breaks(f"{name}: position {position} was passed over")
        for position in sorted(got - expected):
            if position > message.previous_position:
                verdict.breaks(f"{name}: position {position} does not belong to this stream or message")
        if selection is not None:
            for event in events:
                if event.left_filter != leaves(selection, event, history.before.get(event.position)):
                    verdict.breaks(f"{name}: left_filter is {event.left_filter} at position {event.position}")


def _may_end_so(code: str, reason: str) -> bool:
    return code in GOES_ON or (code, reason) == ("OUT_OF_RANGE", "POSITION_EXPIRED")


def unique(history: History) -> Verdict:
    """A stream never sends a position twice, nor one that its token had passed; no event has two positions."""
    verdict = Verdict("Unique")
    for stream, message in _messages(history):
        positions: set[int] = set()
        for event in _changes(message):
            verdict.checked += 1
            if event.position in positions or event.position <= message.previous_position:
                verdict.breaks(f"{stream.opened.stream}: position {event.position} is sent again")
            positions.add(event.position)
    ids: dict[str, int] = {}
    for position, event in history.log.items():
        if ids.setdefault(event.id, position) != position:
            verdict.breaks(f"event {event.id} is at positions {ids[event.id]} and {position}")
    return verdict


def groups(history: History) -> dict[str, list[int]]:
    """The positions of each atomic group of more than one event."""
    return {
        op: sorted(positions)
        for op, positions in history.made.items()
        if len(history.changes[op].intent.tags) > 1 and not history.changes[op].intent.each
    }


def inside(history: History) -> dict[int, str]:
    """The positions at which no token may stand, and the change that is why."""
    return {position: op for op, found in groups(history).items() for position in range(found[0], found[-1])}


def atomic(history: History) -> Verdict:
    """No token stands inside a group, a group is whole and in one piece, a message stays under 1 MiB."""
    verdict = Verdict("Atomic")
    forbidden = inside(history)
    for op, positions in groups(history).items():
        verdict.checked += 1
        wanted = len(history.changes[op].intent.tags)
        # Of a group that was removed before all of it was received nothing can be said.
        if history.unseen and len(positions) < wanted:
            continue
        if len(positions) != wanted or positions[-1] - positions[0] + 1 != wanted:
            verdict.breaks(f"{op}: {wanted} users are {len(positions)} events at {positions[0]} to {positions[-1]}")
    for stream, message in _messages(history):
        verdict.checked += 1
        if message.size >= _LARGEST_MESSAGE:
            verdict.breaks(f"{stream.opened.stream}: a message of {message.size} bytes")
        if message.token and message.position in forbidden:
            verdict.breaks(
                f"{stream.opened.stream}: a token at {message.position}, inside {forbidden[message.position]}"
            )
    return verdict


def resumable(history: History) -> Verdict:
    """Each token that was handed out is accepted everywhere and continues exactly; a forged one is refused."""
    verdict = Verdict("Resumable")
    for stream in history.streams.values():
        opened, closed = stream.opened, stream.closed
        if opened.start == "forged":
            if stream.messages:
                verdict.breaks(f"{opened.stream}: a token that is not of this log was accepted")
            verdict.checked += bool(stream.messages) or (closed is not None and closed.code not in GOES_ON)
        elif stream.messages:
            if opened.start == "token":
                verdict.checked += 1
                stands, first = history.tokens[opened.token], stream.messages[0]
                if (first.previous_position, first.position) != (stands, stands):
                    verdict.breaks(f"{opened.stream}: a token of {stands} went on after {first.position}")
        elif closed is not None and closed.by == "server" and not _is_passing_refusal(history, stream, closed.earliest):
            verdict.checked += 1
            verdict.breaks(f"{opened.stream}: {opened.start} was refused: {closed.code} {closed.reason}")
    return verdict


def _is_passing_refusal(history: History, stream: Stream, earliest: int) -> bool:
    assert stream.closed is not None
    if stream.closed.reason == "POSITION_EXPIRED":
        stands = history.tokens.get(stream.opened.token)
        return stands is None or (stands + 1 < earliest <= history.head.earliest)
    return stream.closed.code in GOES_ON


def bookmarked(history: History) -> Verdict:
    """A stream's first message is a bookmark with a token; while nothing disturbs, a token comes every interval."""
    verdict = Verdict("Bookmarked")
    for stream in history.streams.values():
        if not stream.messages or stream.opened.start == "forged":
            continue
        first = stream.messages[0]
        verdict.checked += 1
        if first.mark != "bookmark" or not first.token or first.events:
            verdict.breaks(f"{stream.opened.stream}: begins with {first.mark or 'events'}, token {bool(first.token)}")
        if not stream.opened.paced:
            for calm in history.calms:
                _check_cadence(stream, calm, verdict)
    return verdict


def _check_cadence(stream: Stream, calm: Calm, verdict: Verdict) -> None:
    end = stream.closed.at if stream.closed else stream.messages[-1].at
    times = [message.at for message in stream.messages if message.token]
    times = [at for at in [*times, end] if calm.at < at < calm.until]
    begun = max(calm.at, stream.messages[0].at)
    until = min(calm.until, end)
    if until <= begun:
        return
    for before, after in zip([begun, *times], [*times, until], strict=True):
        verdict.checked += 1
        if after - before > stream.opened.interval + _LATE:
            verdict.breaks(f"{stream.opened.stream}: no token for {after - before:.1f} s of calm")


def settled(change: Change) -> bool:
    """Whether it is known what became of a change."""
    return change.done is not None or change.stores_nothing
