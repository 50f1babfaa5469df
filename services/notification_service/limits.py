"""A token bucket: so many a second, and a burst of so many at once.

Times are seconds of one clock of the caller's, which only goes forward.
"""

from __future__ import annotations


class Bucket:
    """Full at first. `burst` defaults to what comes in a second, at least one."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._rate = rate
        self._burst = max(1.0, rate if burst is None else burst)
        self._tokens = self._burst
        self._at: float | None = None

    def room(self, now: float) -> int:
        """How many may be taken now."""
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        # A hair less than a whole token, by rounding, is one: otherwise who waits for it waits twice.
        return int(self._tokens + 1e-9)

    def take(self, count: int) -> None:
        """Takes what there is room for."""
        self._tokens -= count

    def wait(self) -> float:
        """Seconds, from the last look on, until there is room for one."""
        return max(0.0, (1.0 - self._tokens) / self._rate)
