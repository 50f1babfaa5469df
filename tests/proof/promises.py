"""Every promise of the feed by its name, with the function that checks it."""

from __future__ import annotations

from collections.abc import Callable

from tests.proof import streams, truth
from tests.proof.history import History
from tests.proof.verdict import Verdict

CHECKS: dict[str, Callable[[History], Verdict]] = {
    "Ordered": streams.ordered,
    "Complete": streams.complete,
    "Unique": streams.unique,
    "Atomic": streams.atomic,
    "Honest": truth.honest,
    "Resumable": streams.resumable,
    "Bookmarked": streams.bookmarked,
    "Fair": truth.fair,
    "Snapshot": truth.snapshot,
}


def judge(history: History) -> list[Verdict]:
    """What each check says of a run."""
    return [check(history) for check in CHECKS.values()]
