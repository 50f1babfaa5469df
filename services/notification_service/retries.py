"""What becomes of a delivery after an attempt: done, parked, or tried again after a pause.

Pauses grow exponentially to a cap and are drawn from all of [0, bound] (full jitter), so that what failed together
does not come back together. The other side's Retry-After is a lower bound, up to a day.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from notification_service.channels import Outcome
from notification_service.domain import Ended, Leased, Result, State

_LONGEST_RETRY_AFTER = 86_400.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How often and how fast; seconds."""

    tries: int
    base: float
    factor: float
    cap: float

    def bound(self, number: int) -> float:
        """The greatest pause after try `number` of the policy's."""
        # min of the exponents first: a float overflows at some hundred attempts.
        return min(self.cap, self.base * self.factor ** min(number - 1, 64))


def decide(policy: Policy, leased: Leased, outcome: Outcome) -> Ended:
    """How attempt and delivery go on."""
    state, delay, detail = State.PENDING, 0.0, outcome.detail
    if outcome.result is Result.SUCCEEDED:
        state = State.DELIVERED
    elif outcome.result is Result.REFUSED or leased.turn >= policy.tries:
        state = State.PARKED
    else:
        delay = random.uniform(0, policy.bound(leased.turn))  # noqa: S311 - jitter
        delay = max(delay, min(outcome.retry_after or 0.0, _LONGEST_RETRY_AFTER))
    return Ended(leased.id, leased.number, outcome.result, outcome.code, detail, state, delay)
