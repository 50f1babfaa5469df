"""How a service stands, from two things that are seen of it: what its health says, and whether it answers calls.

Health tells of a change at once, but a process that hangs says nothing; calls find that out. What was last known stays
when a service goes, with the time since when it is so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

State = Literal["unknown", "up", "not ready", "no answer", "refused", "down"]

_REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a service. Health is None while nothing is known, False if it cannot be asked.

    `reason` is what the service gives for not being ready or alive; `call` is the code and message of the last call's
    failure, None if it was answered.
    """

    liveness: bool | None = None
    readiness: bool | None = None
    health_error: str | None = None
    reason: str = ""
    call: tuple[str, str] | None = None


def judged(seen: Seen) -> tuple[State, str]:
    """How it stands, and why if not well."""
    if seen.health_error is not None:
        return "down", _cause(seen.health_error)
    if seen.call is not None and seen.call[0] == "DEADLINE_EXCEEDED":
        return "no answer", "connected, but it does not answer"
    if seen.readiness is False or seen.liveness is False:
        return "not ready", seen.reason
    if seen.call is not None and seen.call[0] in _REFUSALS:
        return "refused", f"the console may not ask: {seen.call[1]}"
    if seen.call is not None and seen.readiness is None:
        return "down", _cause(seen.call[1])
    if seen.readiness is None:
        return "unknown", ""
    return "up", ""


def _cause(message: str) -> str:
    """gRPC tells the whole way down to the cause, which comes last."""
    return message.rpartition(": ")[2]


@dataclass(slots=True)
class Standing:
    """Of one service. `changed` is called when it stands otherwise."""

    name: str
    address: str
    changed: Callable[[], None]
    seen: Seen = field(default_factory=Seen)
    state: State = "unknown"
    reason: str = ""
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    answered: datetime | None = None

    def note(self, seen: Seen) -> None:
        """What is seen now."""
        self.seen = seen
        state, reason = judged(seen)
        if state != self.state:
            self.since = datetime.now(UTC)
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            self.changed()

    def view(self) -> dict[str, Any]:
        """For the page."""
        return {
            "name": self.name,
            "address": self.address,
            "state": self.state,
            "reason": self.reason,
            "live": self.seen.liveness,
            "ready": self.seen.readiness,
            "since": self.since.isoformat(timespec="milliseconds"),
            "answered": self.answered.isoformat(timespec="milliseconds") if self.answered else None,
        }
