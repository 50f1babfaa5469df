"""A breaker: pauses what asks a destination that is away, and finds out when it is back.

Closed, everything may go. So many outages in a row, or one that names a time to come back, open it: nothing goes until
the pause is over. Then one probe may go; if it ends in an outage, too, the next pause is twice as long, up to a bound.
Any answer that is no outage closes it, also one that refuses: whoever refuses is there. Michael Nygard's circuit
breaker ("Release It!"), for one process: each replica finds out for itself.

Times are seconds of one clock of the caller's, which only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """After how many outages in a row a breaker opens, and its first and longest pause, in seconds."""

    failures: int = 5
    pause: float = 5.0
    longest: float = 300.0


class Breaker:
    """`is_open` from the failure that opens it until something succeeds, probes included."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether the destination is held to be away."""
        return self._openings > 0

    def room(self, now: float) -> int | None:
        """How many may go now; None is any number."""
        if not self.is_open:
            return None
        return 1 if now >= self._until else 0

    def wait(self, now: float) -> float:
        """Seconds until `room` may say more."""
        return max(0.0, self._until - now) if self.is_open else 0.0

    def begun(self, now: float, bound: float) -> None:
        """Something went; if that is a probe, no other goes for `bound` seconds: its answer comes before."""
        if self.is_open:
            self._until, self._probing = now + bound, True

    def answered(self) -> bool:
        """The destination is there. Returns whether that closes the breaker."""
        was_open = self.is_open
        self._failures = self._openings = 0
        self._probing = False
        return was_open

    def failed(self, now: float, retry_after: float | None = None) -> bool:
        """An outage; the destination may have said after how many seconds to come back. Returns whether that opens
        the breaker, or keeps it open for longer.
        """
        self._failures += 1
        # What was on its way when the breaker opened says nothing new.
        if self.is_open and not self._probing:
            self._until = max(self._until, now + (retry_after or 0.0))
            return False
        if not (self._probing or retry_after or self._failures >= self._patience.failures):
            return False
        pause = min(self._patience.pause * 2 ** min(self._openings, 32), self._patience.longest)
        self._openings += 1
        self._until, self._probing = now + max(pause, retry_after or 0.0), False
        return True
