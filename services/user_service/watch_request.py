"""What a caller of WatchUsers asks for, checked: one answer names every invalid field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from google.protobuf import duration_pb2

from servicekit.errors import Violation, invalid
from tidings.users.v1 import users_pb2
from user_service import domain, tokens, validation
from user_service.selection import Selection

_DEFAULT_BOOKMARK_INTERVAL = 10.0
_DEFAULT_MAX_BATCH = 1000
_MOST_USER_IDS = 10_000
_MOST_SHARDS = 65_536
_MOST_CHOICES = 100  # of types or fields: more than there are
_TYPES = (domain.CREATED, domain.UPDATED, domain.DELETED, domain.UNDELETED)
_TYPE_NAMES = [users_pb2.UserEvent.Type.Name(kind) for kind in _TYPES]
_CHANGING_FIELDS = (*validation.CALLER_FIELDS, *domain.DELETION_FIELDS)

Start = tokens.ResumeToken | datetime | Literal["earliest", "now", "snapshot"]


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What a stream asks for. `start` is a decoded token, or where to begin without one: a time is that of the first
    event, or of what comes before it. Times are in seconds.
    """

    start: Start
    selection: Selection
    include_previous: bool
    bookmark_interval: float
    max_batch: int
    linger: float


def check(request: users_pb2.WatchUsersRequest) -> WatchRequest:
    """Reads a request. Raises INVALID_FIELD, or BAD_TOKEN."""
    start = request.WhichOneof("start")
    if start is None:
        raise invalid(Violation("start", "is required: one of resume_token, earliest, now, snapshot, since"))
    interval = _DEFAULT_BOOKMARK_INTERVAL
    if request.HasField("bookmark_interval"):
        interval = _seconds(request.bookmark_interval)
    linger = _seconds(request.linger)
    violations: validation.Violations = []
    if not 1 <= interval <= 300:
        violations.append(Violation("bookmark_interval", "must be 1 s to 5 min"))
    if not 0 <= linger <= 1:
        violations.append(Violation("linger", "must be 0 to 1 s"))
    max_batch = request.max_batch or _DEFAULT_MAX_BATCH
    if not 1 <= max_batch <= 10_000:
        violations.append(Violation("max_batch", "must be 1 to 10000"))
    selection = _selection(request, violations)
    if violations:
        raise invalid(*violations)
    checked = WatchRequest(
        start=_start(request, start),
        selection=selection,
        include_previous=request.include_previous,
        bookmark_interval=interval,
        max_batch=max_batch,
        linger=linger,
    )
    if _takes_snapshot(checked.start):
        _refuse_events(request.filter)
    return checked


def _start(request: users_pb2.WatchUsersRequest, start: str) -> Start:
    if start == "resume_token":
        return tokens.decode(request.resume_token)
    if start == "since":
        return validation.time(request.since, "since")
    if start == "snapshot":
        return "snapshot"
    return "now" if start == "now" else "earliest"


def _takes_snapshot(start: Start) -> bool:
    return start == "snapshot" or (isinstance(start, tokens.ResumeToken) and start.snapshot is not None)


def _refuse_events(given: users_pb2.WatchUsersRequest.Filter) -> None:
    """A snapshot has no events to choose from: what is chosen afterwards would not add up to the users."""
    chosen = [name for name in ("types", "changed_fields") if getattr(given, name)]
    if chosen:
        raise invalid(*(Violation(f"filter.{name}", "is not possible with a snapshot") for name in chosen))


def _selection(request: users_pb2.WatchUsersRequest, violations: validation.Violations) -> Selection:
    given, shard = request.filter, request.shard
    if request.HasField("shard"):
        if not 1 <= shard.count <= _MOST_SHARDS:
            violations.append(Violation("shard.count", f"must be 1 to {_MOST_SHARDS}"))
        elif shard.index >= shard.count:
            violations.append(Violation("shard.index", f"must be below the count, {shard.count}"))
    _known(given.types, _TYPES, _TYPE_NAMES, "filter.types", violations)
    _known(given.changed_fields, _CHANGING_FIELDS, _CHANGING_FIELDS, "filter.changed_fields", violations)
    validation.labels(given.labels, "filter.labels", violations)
    user_ids = validation.user_ids(given.user_ids, _MOST_USER_IDS, "filter.user_ids", violations)
    if violations:
        return Selection()
    return Selection(
        user_ids=frozenset(user_ids),
        labels=frozenset(given.labels.items()),
        types=frozenset(given.types),
        changed_fields=domain.field_bits(tuple(sorted(set(given.changed_fields)))),
        shard_index=shard.index,
        shard_count=shard.count or 1,
    )


def _known(
    given: Sequence[object], known: Sequence[object], names: Sequence[str], path: str, violations: validation.Violations
) -> None:
    if len(given) > _MOST_CHOICES:
        violations.append(Violation(path, f"must be at most {_MOST_CHOICES}"))
        return
    wrong = [index for index, value in enumerate(given) if value not in known]
    violations.extend(
        Violation(f"{path}[{index}]", f"must be one of {', '.join(names)}") for index in wrong[: validation.MOST_NAMED]
    )


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
