"""The plain records of a run: what writers intended and were answered, what readers received, what was done to whom.

Every `at` is a time of CLOCK_MONOTONIC in seconds, one clock for all processes of a machine. A user's state is its
digest. A record is one JSON line, `["Kind", field, ...]`, appended to a file outside of the system under test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tidings.users.v1 import users_pb2

_SHORT = 32  # characters of a label

Selection = dict[str, Any]
"""What a stream selects: any of `user_ids`, `labels`, `types`, `changed_fields`, `shard` ([index, count])."""


def digest(user: users_pb2.User) -> str:
    """What stands for all fields of a user."""
    return hashlib.blake2b(user.SerializeToString(deterministic=True), digest_size=8).hexdigest()


class State(NamedTuple):
    """A user at a moment. `tag` is its display name: writers put the change that set it there. `labels` are the short
    ones; writers make a user large with others, which no filter names.
    """

    id: str
    version: int
    digest: str
    tag: str
    labels: dict[str, str]
    living: bool


def state(user: users_pb2.User) -> State:
    """The record of a user."""
    labels = {key: value for key, value in user.labels.items() if len(value) <= _SHORT}
    return State(user.id, user.version, digest(user), user.display_name, labels, not user.HasField("delete_time"))


# What writers do. A change is written down before it is first asked for.


class Intent(NamedTuple):
    """A change that a writer is about to ask for. `tags` are those of the users it creates or the update it makes;
    `user_id` is whom it changes, "" if it creates; `stores` is false if it only validates. With `each` its users are
    created each on its own, else all or none.
    """

    op: str
    method: str
    at: float
    tags: list[str]
    user_id: str
    stores: bool = True
    each: bool = False


class Attempt(NamedTuple):
    """A call begins, on a replica."""

    op: str
    replica: int
    at: float


class Outcome(NamedTuple):
    """What the newest attempt of a change came to, and when.

    `result` is `done` (with `users` as answered), `refused` (nothing of it is stored), `nothing` (this attempt did
    nothing, another may follow) or `unsure` (nobody knows).
    """

    op: str
    at: float
    result: str
    reason: str
    users: list[State]


# What readers receive.


class Opened(NamedTuple):
    """A stream is asked for. Streams of one session follow each other by their tokens.

    `start` is `earliest`, `now`, `since`, `snapshot`, `token`, or `forged` with a token that must be refused. `paced`
    says that the reader takes its time, so that nothing can be said about when it was sent something.
    """

    stream: str
    session: str
    replica: int
    at: float
    start: str
    token: str
    interval: float
    since_ns: int
    selection: Selection | None
    paced: bool


class Event(NamedTuple):
    """An event as received. `previous` is the digest of the user before, if it came along."""

    position: int
    id: str
    type: str
    user: State
    time_ns: int
    fields: list[str]
    left_filter: bool
    previous: str | None


class Message(NamedTuple):
    """A message as received; `mark` is the name of its mark or "", `mark_position` the position or head it tells."""

    stream: str
    at: float
    size: int
    previous_position: int
    position: int
    token: str
    mark: str
    mark_position: int
    events: list[Event]


class Closed(NamedTuple):
    """A stream ended: `by` the reader, or the server with a code and reason. `earliest` is what it said is retained."""

    stream: str
    at: float
    by: str
    code: str
    reason: str
    earliest: int


# What is done to the system, and what it left.


class Fault(NamedTuple):
    """Something was done to a replica (-1: to all) from `at` until `until`. `hit` says whether work was in flight, None
    if the calls that were open tell.
    """

    kind: str
    replica: int
    at: float
    until: float
    hit: bool | None = None


class Calm(NamedTuple):
    """From `at` until `until` nobody did anything to anybody, and every process had its turn."""

    at: float
    until: float


class Stuck(NamedTuple):
    """`streams` subscribers of a replica stopped reading while `events` were written; then its memory grew by `grown`
    of `allowed` bytes, and `witnesses` of its other subscribers had received `received` events together.
    """

    replica: int
    streams: int
    events: int
    witnesses: int
    received: int
    grown: int
    allowed: int


class Row(NamedTuple):
    """A user in the table at the end."""

    user: State


class Head(NamedTuple):
    """The feed at the end."""

    earliest: int
    head: int


Record = Intent | Attempt | Outcome | Opened | Message | Closed | Fault | Calm | Stuck | Row | Head
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Intent, Attempt, Outcome, Opened, Message, Closed, Fault, Calm, Stuck, Row, Head)
}  # fmt: skip


def dump(record: Record) -> bytes:
    """A record as a line."""
    return json.dumps([type(record).__name__, *record], ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _event(fields: list[Any]) -> Event:
    fields[3] = State(*fields[3])
    return Event(*fields)


def load(line: bytes) -> Record:
    """A line as a record."""
    name, *fields = json.loads(line)
    if name == "Message":
        fields[-1] = [_event(event) for event in fields[-1]]
    elif name == "Outcome":
        fields[-1] = [State(*user) for user in fields[-1]]
    elif name == "Row":
        fields = [State(*fields[0])]
    record: Record = _KINDS[name](*fields)
    return record


def read(directory: Path) -> Iterator[Record]:
    """All records of a run; a last line that was cut off by a kill is left out."""
    for path in sorted(directory.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield load(line)
