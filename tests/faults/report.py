"""What a run proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from tests.faultrun.report import RunReport, share, wanted_hits
from tests.faults.kinds import KINDS
from tests.proof.exercise import tallies
from tests.proof.history import History
from tests.proof.promises import judge

# What a run of full length must have checked; shorter runs in proportion.
_EVENTS = 100_000


@dataclass(frozen=True)
class Report(RunReport):
    """The result of a run."""

    events: int
    wanted_events: int
    unseen: int

    def unexercised(self) -> Iterator[str]:
        if self.unseen:
            yield "events that were removed before anybody had received them"
        if self.events < self.wanted_events:
            yield "events"

    def show(self, console: Console) -> None:
        self.show_promises(console)
        self.show_faults(console)
        console.print(f"events received and checked: {self.events:,} (wanted: {self.wanted_events:,})")
        self.show_verdict(console)


def report(history: History, seed: int, seconds: float, notes: dict[str, object]) -> Report:
    """Judges a run."""
    return Report(
        seed, seconds, wanted_hits(seconds), judge(history), tallies(history, KINDS), notes,
        history.received, int(_EVENTS * share(seconds)), history.unseen,
    )  # fmt: skip
