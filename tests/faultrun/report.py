"""What every fault run reports: its promises and faults, as tables and as JSON, and the exit code that it earns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.proof.exercise import Tally
from tests.proof.verdict import Verdict

KEPT, BROKEN, NOT_EXERCISED = 0, 1, 3
_WORDS = {KEPT: "kept", BROKEN: "broken", NOT_EXERCISED: "not exercised"}

# What a run of full length must have hit; shorter runs in proportion.
FULL_SECONDS = 300.0
_HITS = 20


def share(seconds: float) -> float:
    """Which part of a run of full length one of this length is, at most all."""
    return min(1.0, seconds / FULL_SECONDS)


def wanted_hits(seconds: float) -> int:
    """How often each kind of fault must hit work in flight in a run of this length."""
    return max(1, int(_HITS * share(seconds)))


@dataclass(frozen=True)
class RunReport(ABC):
    """The result of a run."""

    seed: int
    seconds: float
    wanted_hits: int
    verdicts: list[Verdict]
    tallies: list[Tally]
    notes: dict[str, object]

    @abstractmethod
    def unexercised(self) -> Iterable[str]:
        """What else than faults and promises was not exercised enough."""

    @abstractmethod
    def show(self, console: Console) -> None:
        """Prints the tables."""

    @property
    def missed(self) -> list[str]:
        """What was not exercised enough."""
        missed = [tally.kind for tally in self.tallies if tally.hits < self.wanted_hits]
        missed += [verdict.promise for verdict in self.verdicts if not verdict.checked]
        missed += ["the end"] if "ended early" in self.notes else []
        return [*missed, *self.unexercised()]

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

    def show_promises(self, console: Console) -> None:
        """What was checked and broken, with examples."""
        promises = Table("promise", "checked", "broken", box=None, pad_edge=False)
        for verdict in self.verdicts:
            promises.add_row(verdict.promise, f"{verdict.checked:,}", f"{verdict.broken:,}")
        console.print(promises)
        for verdict in self.verdicts:
            for example in verdict.examples[:5]:
                console.print(f"{verdict.promise}: {example}", markup=False, highlight=False, soft_wrap=True)
        console.print()

    def show_faults(self, console: Console) -> None:
        """How often each fault was done, and hit work in flight."""
        faults = Table("fault", "times", "hit work in flight", box=None, pad_edge=False)
        for tally in self.tallies:
            faults.add_row(tally.kind, f"{tally.times:,}", f"{tally.hits:,}")
        console.print(faults)
        console.print()

    def show_verdict(self, console: Console) -> None:
        """The notes, and whether every promise was kept."""
        for name, note in self.notes.items():
            console.print(f"{name}: {note}", highlight=False)
        missed = f" (not exercised enough: {', '.join(self.missed)}; wanted hits: {self.wanted_hits})"
        console.print(
            f"seed {self.seed}, {self.seconds:g} s: [bold]{_WORDS[self.exit_code]}[/bold]"
            + (missed if self.missed else ""),
            highlight=False,
            soft_wrap=True,
        )
