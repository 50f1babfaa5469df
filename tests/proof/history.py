"""A run put in order: the log as subscribers saw it, streams and sessions, and which change made which event.

The log is the union of all events that anybody received. A created or updated user carries the tag of the change that
made it; a deletion is known by the version that was answered or, if nobody was answered, by its user.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

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
    Selection,
    State,
    Stuck,
)
from tests.proof.selection import selects_user

_TYPES = {"UpdateUser": "UPDATED", "DeleteUser": "DELETED", "UndeleteUser": "UNDELETED"}


_EMPTY = Head(earliest=1, head=0)


@dataclass(slots=True)
class Stream:
    """One stream, from its request to its end."""

    opened: Opened
    messages: list[Message] = field(default_factory=list)
    closed: Closed | None = None


@dataclass(slots=True)
class Change:
    """A change that a writer intended, and each attempt with what it came to (None: the writer was ended before)."""

    intent: Intent
    attempts: list[tuple[Attempt, Outcome | None]] = field(default_factory=list)

    @property
    def done(self) -> Outcome | None:
        """The first answer that it is done."""
        return next((outcome for _, outcome in self.attempts if outcome and outcome.result == "done"), None)

    @property
    def stores_nothing(self) -> bool:
        """Whether it certainly has no event: it only validates, or was refused and no attempt is in doubt."""
        results = {outcome.result if outcome else "unsure" for _, outcome in self.attempts}
        return not self.intent.stores or not results & {"done", "unsure"}


@dataclass(slots=True)
class History:
    """All that a run wrote down. Positions up to `base` are older than the run."""

    base: int = 0
    log: dict[int, Event] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    rows: dict[str, State] = field(default_factory=dict)
    head: Head = _EMPTY
    faults: list[Fault] = field(default_factory=list)
    calms: list[Calm] = field(default_factory=list)
    stuck: list[Stuck] = field(default_factory=list)
    # Derived: the user before each event; the events of each change; the events that no change explains.
    before: dict[int, State] = field(default_factory=dict)
    made: dict[str, list[int]] = field(default_factory=dict)
    unexplained: list[int] = field(default_factory=list)
    # Where each token stands that was handed out.
    tokens: dict[str, int] = field(default_factory=dict)
    _selected_since: dict[str, dict[str, int]] = field(default_factory=dict)

    def selected_since(self, selection: Selection | None) -> dict[str, int]:
        """The users that are living and selected at the end of the log, and from which position on without a break."""
        key = json.dumps(selection, sort_keys=True)
        if key not in self._selected_since:
            since = self._selected_since[key] = {}
            for position in sorted(self.log):
                user = self.log[position].user
                if not user.living or not selects_user(selection or {}, user):
                    since.pop(user.id, None)
                else:
                    since.setdefault(user.id, position)
        return self._selected_since[key]

    @property
    def unseen(self) -> int:
        """Positions that were removed before anybody received them: nothing can be said of what was there."""
        return sum(position not in self.log for position in range(self.base + 1, self.head.earliest))

    @property
    def sessions(self) -> dict[str, list[Stream]]:
        """The streams of each session, in their order."""
        found: dict[str, list[Stream]] = defaultdict(list)
        for stream in self.streams.values():
            found[stream.opened.session].append(stream)
        return found

    @property
    def received(self) -> int:
        """Events that all readers together have received."""
        return sum(len(message.events) for stream in self.streams.values() for message in stream.messages)


def gather(records: Iterable[Record], base: int = 0) -> History:
    """Puts records in order; those of one writer or stream must come in theirs."""
    history = History(base)
    opened: list[Opened] = []
    pending: list[Message | Closed] = []
    for record in records:
        match record:
            case Intent():
                history.changes[record.op] = Change(record)
            case Attempt():
                history.changes[record.op].attempts.append((record, None))
            case Outcome():
                attempts = history.changes[record.op].attempts
                attempts[-1] = (attempts[-1][0], record)
            case Opened():
                opened.append(record)
            case Message():
                pending.append(_shared(history, record))
            case Closed():
                pending.append(record)
            case Fault():
                history.faults.append(record)
            case Calm():
                history.calms.append(record)
            case Stuck():
                history.stuck.append(record)
            case Row(user):
                history.rows[user.id] = user
            case Head():
                history.head = record
    for one in sorted(opened, key=lambda one: one.at):
        history.streams[one.stream] = Stream(one)
    for record in pending:
        stream = history.streams[record.stream]
        if isinstance(record, Message):
            stream.messages.append(record)
            if record.token:
                history.tokens.setdefault(record.token, record.position)
        else:
            stream.closed = record
    _explain(history)
    return history


def _shared(history: History, message: Message) -> Message:
    """Notes a message's events in the log; equal events of many readers become one in memory."""
    events = []
    for event in message.events:
        if event.type == "SNAPSHOT":
            events.append(event)
            continue
        known = history.log.setdefault(event.position, event)
        if known == event:
            event = known
        elif known[:6] != event[:6]:
            history.contradictions.append(
                f"position {event.position} is {known.id} of {known.user.tag!r} to one stream"
                f" and {event.id} of {event.user.tag!r} to {message.stream}"
            )
        events.append(event)
    return message._replace(events=events)


def _explain(history: History) -> None:
    by_tag: dict[str, Change] = {}
    by_answer: dict[tuple[str, int], Change] = {}
    in_doubt: dict[tuple[str, str], list[Change]] = defaultdict(list)
    for change in history.changes.values():
        kind = _TYPES.get(change.intent.method, "CREATED")
        by_tag |= dict.fromkeys(change.intent.tags, change)
        if change.done:
            by_answer |= {(user.id, user.version): change for user in change.done.users}
        elif not change.stores_nothing:
            in_doubt[(change.intent.user_id, kind)].append(change)
    states: dict[str, State] = {}
    for position in sorted(history.log):
        event = history.log[position]
        if event.user.id in states:
            history.before[position] = states[event.user.id]
        states[event.user.id] = event.user
        if position <= history.base:
            continue
        found: Change | None = None
        if event.type in ("CREATED", "UPDATED"):
            found = by_tag.get(event.user.tag)
        else:
            found = by_answer.get((event.user.id, event.user.version))
            doubtful = in_doubt[(event.user.id, event.type)]
            if found is None and doubtful:
                found = doubtful.pop(0)
        if found is None or not _fits(found.intent, event):
            history.unexplained.append(position)
        else:
            history.made.setdefault(found.intent.op, []).append(position)


def _fits(intent: Intent, event: Event) -> bool:
    kind = _TYPES.get(intent.method, "CREATED")
    return event.type == kind and intent.user_id in ("", event.user.id)
