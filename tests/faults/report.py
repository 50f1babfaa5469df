"""What a run proved, as a table and as JSON, and the exit code that it earns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.kinds import KINDS
from tests.proof.exercise import Tally, tallies
from tests.proof.history import History
from tests.proof.promises import judge
from tests.proof.verdict import Verdict

KEPT, BROKEN, NOT_EXERCISED = 0, 1, 3
_WORDS = {KEPT: "kept", BROKEN: "broken", NOT_EXERCISED: "not exercised"}

# What a run of full length must have hit and checked; shorter runs in proportion.
FULL_SECONDS = 300.0
_HITS, _EVENTS = 20, 100_000


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run."""

    seed: int
    seconds: float
    events: int
    wanted_hits: int
    wanted_events: int
    verdicts: list[Verdict]
    tallies: list[Tally]
    notes: dict[str, object]
    unseen: int

    @property
    def missed(self) -> list[str]:
        """What was not exercised enough."""
        missed = [tally.kind for tally in self.tallies if tally.hits < self.wanted_hits]
        missed += [verdict.promise for verdict in self.verdicts if not verdict.checked]
        missed += ["events that were removed before anybody had received them"] if self.unseen else []
        missed += ["the end"] if "ended early" in self.notes else []
        return missed + (["events"] if self.events < self.wanted_events else [])

    @property
    def broken(self) -> list[str]:
        """The promises that were broken."""
        return [verdict.promise for verdict in self.verdicts if verdict.broken]

    @property
    def exit_code(self) -> int:
        """0 kept, 1 broken, 3 not exercised."""
        return BROKEN if self.broken else NOT_EXERCISED if self.missed else KEPT

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"missed": self.missed, "verdict": _WORDS[self.exit_code]}


def wanted_hits(seconds: float) -> int:
    """How often each kind of fault must hit work in flight in a run of this length."""
    return max(1, int(_HITS * min(1.0, seconds / FULL_SECONDS)))


def report(history: History, seed: int, seconds: float, notes: dict[str, object]) -> Report:
    """Judges a run."""
    wanted_events = int(_EVENTS * min(1.0, seconds / FULL_SECONDS))
    return Report(
        seed, seconds, history.received, wanted_hits(seconds), wanted_events,
        judge(history), tallies(history, KINDS), notes, history.unseen,
    )  # fmt: skip


def show(report: Report, console: Console) -> None:
    """Prints the tables."""
    promises = Table("promise", "checked", "broken", box=None, pad_edge=False)
    for verdict in report.verdicts:
        promises.add_row(verdict.promise, f"{verdict.checked:,}", f"{verdict.broken:,}")
    console.print(promises)
    for verdict in report.verdicts:
        for example in verdict.examples[:5]:
            console.print(f"{verdict.promise}: {example}", markup=False, highlight=False, soft_wrap=True)
    console.print()
    faults = Table("fault", "times", "hit work in flight", box=None, pad_edge=False)
    for tally in report.tallies:
        faults.add_row(tally.kind, f"{tally.times:,}", f"{tally.hits:,}")
    console.print(faults)
    console.print()
    console.print(f"events received and checked: {report.events:,} (wanted: {report.wanted_events:,})")
    for name, note in report.notes.items():
        console.print(f"{name}: {note}", highlight=False)
    missed = f" (not exercised enough: {', '.join(report.missed)}; wanted hits: {report.wanted_hits})"
    console.print(
        f"seed {report.seed}, {report.seconds:g} s: [bold]{_WORDS[report.exit_code]}[/bold]"
        + (missed if report.missed else ""),
        highlight=False,
        soft_wrap=True,
    )
