"""The promises of deliveries, each with the function that checks it against the evidence of a run. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from tests.delivery_faults import expected
from tests.delivery_faults.evidence import AWAY, KILLED, PAUSED, Attempt, Delivery, Evidence
from tests.harness.bad import Received
from tests.proof.verdict import Verdict

_REASONED = ("PARKED", "CANCELLED")

# Why a delivery may arrive twice.
NOT_ANSWERED = "accepted, and not answered"
NOT_READ = "accepted and answered, and the answer was not read in time"
BY_KILL = "its replica was killed while it was on its way"
BY_PAUSE = "its replica was paused beyond the lease while it was on its way"
BY_OUTAGE = "the database was away beyond the lease while it was on its way"
CAUSES = (NOT_ANSWERED, NOT_READ, BY_KILL, BY_PAUSE, BY_OUTAGE)

# Between what a process does and what is written down of it. Seconds.
_SLACK = 1.0
_BY = {KILLED: BY_KILL, PAUSED: BY_PAUSE, AWAY: BY_OUTAGE}


def ended(evidence: Evidence) -> Verdict:
    """Every delivery has ended, each end with its reason."""
    verdict = Verdict("Ended")
    discarded = {one.delivery_id for one in evidence.operations if one.kind == "DISCARDED"}
    succeeded = {one.delivery_id for one in evidence.attempts if one.outcome == "SUCCEEDED"}
    tries = Counter(one.delivery_id for one in evidence.attempts)
    for one in evidence.deliveries:
        verdict.checked += 1
        if one.state == "PENDING":
            verdict.breaks(f"delivery {one.id} ({one.channel}) is still pending after {one.tries} tries")
        elif one.state in _REASONED and not one.end_reason:
            verdict.breaks(f"delivery {one.id} is {one.state} without a reason")
        elif one.state == "DISCARDED" and one.id not in discarded:
            verdict.breaks(f"delivery {one.id} is discarded by nobody")
        elif one.state == "DELIVERED" and one.id not in succeeded:
            verdict.breaks(f"delivery {one.id} is delivered without an attempt that succeeded")
        elif tries[one.id] != one.tries:
            verdict.breaks(f"delivery {one.id} has {tries[one.id]} attempts and says {one.tries}")
        elif not one.end:
            verdict.breaks(f"delivery {one.id} is {one.state} and does not say since when")
    return verdict


def complete(evidence: Evidence) -> Verdict:
    """Each event that a rule matches has exactly its notifications, and they their deliveries."""
    verdict = Verdict("Complete")
    known = {(event.user_id, event.version) for event in evidence.events}
    for change in set(evidence.changes):
        verdict.checked += 1
        if change not in known:
            verdict.breaks(f"the feed has no event of user {change.user_id} version {change.version}")
    rules = expected.rules()
    made = [one for event in evidence.events for one in expected.made_of(event, rules, evidence.endpoints)]
    notifications = {
        one.id: (one.event_id, one.event_position, one.user_id, one.rule) for one in evidence.notifications
    }
    for one in made:
        verdict.checked += 1
        wanted = one.event.id, one.event.position, one.event.user_id, one.rule
        if notifications.pop(one.id, None) != wanted:
            verdict.breaks(f"event {one.event.position} has no notification of rule {one.rule}, or another one")
    for identity in notifications:
        verdict.breaks(f"notification {identity} was made of nothing")
    deliveries = {
        one.id: (one.notification_id, one.user_id, one.channel, one.target, one.key) for one in evidence.deliveries
    }
    for delivery in (delivery for one in made for delivery in one.deliveries):
        verdict.checked += 1
        if deliveries.pop(delivery.id, None) != tuple(delivery[1:]):
            verdict.breaks(f"delivery {delivery.id} to {delivery.target} is missing, or another one")
    for identity in deliveries:
        verdict.breaks(f"delivery {identity} was made of nothing")
    return verdict


def known(evidence: Evidence) -> Verdict:
    """What is called delivered was accepted before, and what was accepted has a delivery to that target."""
    verdict = Verdict("Known")
    accepted = _accepted(evidence)
    for one in evidence.deliveries:
        if one.state == "DELIVERED":
            verdict.checked += 1
            times = [received.at for received in accepted.get(one.key, ())]
            if not times:
                verdict.breaks(f"delivery {one.id} is delivered and no server has it")
            elif min(times) > one.end:
                verdict.breaks(f"delivery {one.id} was delivered before a server had it")
    targets = {one.key: one.target for one in evidence.deliveries}
    for received in evidence.received:
        verdict.checked += 1
        if received.key not in targets:
            verdict.breaks(f"{received.server} has got {received.key!r}, which is no delivery's")
        elif not targets[received.key].endswith(received.target):
            verdict.breaks(f"{received.server} has got {received.key} for {received.target}, which is another's")
    return verdict


def same(evidence: Evidence) -> Verdict:
    """Whatever arrives again, accepted or not, arrives with the same key and the same bytes."""
    verdict = Verdict("Same")
    for key, arrived in _by_key(evidence.received).items():
        first, *others = arrived
        for other in others:
            verdict.checked += 1
            if other.content != first.content:
                verdict.breaks(f"{key} arrived with other bytes at {other.server} than at {first.server}")
    return verdict


def excused(evidence: Evidence) -> Verdict:
    """What was accepted twice could not have been known to be accepted."""
    verdict = Verdict("Excused")
    for key, cause in _duplicates(evidence):
        verdict.checked += 1
        if cause is None:
            verdict.breaks(f"{key} was accepted again, and nothing explains it")
    return verdict


def causes(evidence: Evidence) -> dict[str, int]:
    """How many duplicates were excused by what."""
    found = Counter(cause for _, cause in _duplicates(evidence))
    return {cause: found[cause] for cause in CAUSES}


def _duplicates(evidence: Evidence) -> Iterable[tuple[str, str | None]]:
    """The key of each acceptance after a first one, and what excuses it."""
    ids = {one.key: one.id for one in evidence.deliveries}
    attempts = _attempts(evidence)
    for key, arrived in _accepted(evidence).items():
        for before, after in pairwise(arrived):
            yield key, _cause(evidence, attempts.get(ids.get(key, ""), []), before, after)


def _cause(evidence: Evidence, attempts: Sequence[Attempt], before: Received, after: Received) -> str | None:
    timeout = evidence.bounds.timeout
    if not before.answer_time:
        return NOT_ANSWERED
    made = [one for one in attempts if one.start <= before.at]
    if not made:
        return None
    last = made[-1]
    if not last.end and (cause := _met(evidence, last, last.start + timeout)):
        return cause
    if last.outcome == "FAILED" and not last.code and last.end - last.start >= 0.9 * timeout:
        return _met(evidence, last, last.end) or NOT_READ
    # Whoever was stopped in the middle of an attempt goes on with it when it wakes, though it is another's by then.
    for deed in evidence.deeds:
        if deed.what == PAUSED:
            stopped = any(not one.end and deed.at - timeout - _SLACK <= one.start <= deed.at for one in attempts)
            late = any(deed.until - _SLACK <= one.at <= deed.until + timeout + _SLACK for one in (before, after))
            if stopped and late:
                return BY_PAUSE
    return None


def _met(evidence: Evidence, attempt: Attempt, until: float) -> str | None:
    """What was done while an attempt was on its way until then, or its outcome could not be recorded."""
    for what in (KILLED, PAUSED, AWAY):
        # An outcome waits for the database as long as it is away; the lease does not.
        last = until + (evidence.bounds.lease if what == AWAY else _SLACK)
        for deed in evidence.deeds:
            if deed.what == what and deed.until >= attempt.start - _SLACK and deed.at <= last:
                return _BY[what]
    return None


def ordered(evidence: Evidence) -> Verdict:
    """To one user by one channel at one target the first acceptances are in the order of the positions."""
    verdict = Verdict("Ordered")
    accepted = _accepted(evidence)
    away = _Away(evidence)
    lines: dict[tuple[str, str, str], list[Delivery]] = defaultdict(list)
    for one in sorted(evidence.deliveries, key=lambda one: one.position):
        lines[one.user_id, one.channel, one.target].append(one)
    for line in lines.values():
        passed: list[tuple[float, Delivery]] = []
        for one in line:
            arrived = accepted.get(one.key)
            if not arrived:
                continue
            for at, earlier in passed:
                verdict.checked += 1
                if at > arrived[0].at and not away.before(earlier, arrived[0].at):
                    verdict.breaks(
                        f"delivery {one.id} to {one.target} has overtaken {earlier.id}: {arrived[0].at:.3f}, {at:.3f},"
                        f" which is {away.told(earlier)}"
                    )
            passed.append((arrived[0].at, one))
    return verdict


class _Away:
    """When deliveries stood aside, so that later ones might pass."""

    def __init__(self, evidence: Evidence) -> None:
        self._holds = evidence.bounds.parked_holds
        self._attempts = _attempts(evidence)
        self._operations = defaultdict(list)
        for one in evidence.operations:
            self._operations[one.delivery_id].append(one)

    def before(self, delivery: Delivery, time: float) -> bool:
        """Whether it had ended, or was parked where that holds nobody back, at some time before."""
        operations = self._operations[delivery.id]
        if any(one.kind == "DISCARDED" and one.time <= time for one in operations):
            return True
        if delivery.state == "CANCELLED" and delivery.end <= time:
            return True
        if delivery.channel in self._holds:
            return False
        # A refusal parks; what has used up its tries is parked by its last attempt before it was replayed, or for good.
        attempts = self._attempts[delivery.id]
        parked = [one.end for one in attempts if one.outcome == "REFUSED"]
        parked += [max((one.end for one in attempts if one.start <= done.time), default=0.0) for done in operations]
        if delivery.state == "PARKED":
            parked.append(delivery.end)
        return any(since and since <= time for since in parked)

    def told(self, delivery: Delivery) -> str:
        """What became of it, for who looks for the reason."""
        attempts = "; ".join(
            f"{one.outcome} {one.code} {one.start:.3f}-{one.end:.3f}" for one in self._attempts[delivery.id]
        )
        operations = "; ".join(f"{one.kind} {one.time:.3f}" for one in self._operations[delivery.id])
        return (
            f"{delivery.state} {delivery.end_reason} at {delivery.end:.3f} by {attempts}; {operations or 'untouched'}"
        )


def dense(evidence: Evidence) -> Verdict:
    """Positions of notifications, and of deliveries, are 1 to n."""
    verdict = Verdict("Dense")
    for what, rows in (("notifications", evidence.notifications), ("deliveries", evidence.deliveries)):
        positions = sorted(one.position for one in rows)
        for wanted, found in enumerate(positions, 1):
            verdict.checked += 1
            if wanted != found:
                verdict.breaks(f"position {wanted} of {what} is {found}")
                break
    return verdict


def _by_key(received: Iterable[Received]) -> dict[str, list[Received]]:
    found: dict[str, list[Received]] = defaultdict(list)
    for one in sorted(received, key=lambda one: one.at):
        found[one.key].append(one)
    return found


def _accepted(evidence: Evidence) -> dict[str, list[Received]]:
    return _by_key(one for one in evidence.received if one.accepted)


def _attempts(evidence: Evidence) -> dict[str, list[Attempt]]:
    found: dict[str, list[Attempt]] = defaultdict(list)
    for one in sorted(evidence.attempts, key=lambda one: one.number):
        found[one.delivery_id].append(one)
    return found


CHECKS: dict[str, Callable[[Evidence], Verdict]] = {
    "Ended": ended,
    "Complete": complete,
    "Known": known,
    "Same": same,
    "Excused": excused,
    "Ordered": ordered,
    "Dense": dense,
}


def judge(evidence: Evidence) -> list[Verdict]:
    """What each check says of a run."""
    return [check(evidence) for check in CHECKS.values()]
