"""What becomes of a delivery after an attempt: done, parked, or tried again after a pause.

Pauses grow exponentially to a cap and are drawn from all of [0, bound] (full jitter), so that what failed together
does not come back together. The other side's Retry-After is a lower bound, up to a day.

An attempt that an outage of the other side ended is none of the policy's tries once that outage has been noticed: then
its breaker is open, and what is paused by it is not parked, unless its time is over.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from notification_service.channels import Outcome
from notification_service.domain import EXPIRED, REFUSED, TRIES_EXHAUSTED, Ended, Leased, Result, State

_LONGEST_RETRY_AFTER = 86_400.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How often and how fast a channel tries; seconds."""

    tries: int
    base: float
    factor: float
    cap: float
    # Of one attempt.
    timeout: float = 10.0
    # From the first attempt on, however many tries are left.
    max_age: float = 259_200.0
    # Whether a parked delivery holds back the later ones of its user and channel.
    parked_holds: bool = True
    # SMTP and HTTP codes that the channel holds to be for good and are not, and the other way round.
    retry_codes: frozenset[int] = frozenset()
    refuse_codes: frozenset[int] = frozenset()

    def bound(self, number: int) -> float:
        """The greatest pause after try `number` of the policy's."""
        # min of the exponents first: a float overflows at some hundred attempts.
        return min(self.cap, self.base * self.factor ** min(number - 1, 64))

    def judge(self, outcome: Outcome) -> Result:
        """An outcome's result, as this policy has it."""
        if outcome.result is Result.REFUSED and outcome.code in self.retry_codes:
            return Result.FAILED
        if outcome.result is Result.FAILED and outcome.code in self.refuse_codes:
            return Result.REFUSED
        return outcome.result


def decide(policy: Policy, leased: Leased, outcome: Outcome, *, away: bool = False, alternative: bool = False) -> Ended:
    """How attempt and delivery go on. `away`: the breaker of who was asked is open; `alternative`: another can be
    asked instead.
    """
    result = policy.judge(outcome)
    state, reason, delay = State.PENDING, "", 0.0
    uncounted = outcome.outage and away
    if result is Result.SUCCEEDED:
        state = State.DELIVERED
    elif result is Result.REFUSED:
        state, reason = State.PARKED, REFUSED
    elif leased.late:
        state, reason = State.PARKED, EXPIRED
    elif not uncounted and leased.turn >= policy.tries:
        state, reason = State.PARKED, TRIES_EXHAUSTED
    elif not (outcome.outage and alternative and not leased.failed_provider):
        bound = 0.0 if uncounted else policy.bound(leased.turn)
        delay = random.uniform(0, bound)  # noqa: S311 - jitter
        delay = max(delay, min(outcome.retry_after or 0.0, _LONGEST_RETRY_AFTER))
    return Ended(
        leased.id,
        leased.number,
        result,
        outcome.code,
        outcome.detail,
        state,
        delay,
        reason=reason,
        counts=not uncounted,
        failed_provider=leased.provider if outcome.outage else "",
    )
