"""What a run proved, as tables and as JSON, and the exit code that it earns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.delivery_faults.evidence import Evidence
from tests.delivery_faults.kinds import KINDS
from tests.delivery_faults.promises import BY_OUTAGE, NOT_READ, causes, judge
from tests.faults.report import BROKEN, FULL_SECONDS, KEPT, NOT_EXERCISED, wanted_hits
from tests.harness.bad_http import Trouble as HttpTrouble
from tests.harness.bad_smtp import OF_CONNECTIONS, OF_MAILS, Act, Stage, Trouble
from tests.proof.exercise import Tally
from tests.proof.verdict import Verdict

_WORDS = {KEPT: "kept", BROKEN: "broken", NOT_EXERCISED: "not exercised"}
# What a run of full length must have delivered; shorter runs in proportion.
_DELIVERIES = 5_000
# What the run does not bring about at will.
_BY_CHANCE = (BY_OUTAGE, NOT_READ)
_TROUBLES = (*OF_CONNECTIONS, *OF_MAILS, *HttpTrouble)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run."""

    seed: int
    seconds: float
    deliveries: int
    wanted_hits: int
    wanted_deliveries: int
    states: dict[str, int]
    verdicts: list[Verdict]
    causes: dict[str, int]
    tallies: list[Tally]
    troubles: dict[str, int]
    notes: dict[str, object]

    @property
    def missed(self) -> list[str]:
        """What was not exercised enough."""
        missed = [tally.kind for tally in self.tallies if tally.hits < self.wanted_hits]
        missed += [trouble for trouble, times in self.troubles.items() if times < self.wanted_hits]
        missed += [verdict.promise for verdict in self.verdicts if not verdict.checked]
        missed += [cause for cause, times in self.causes.items() if not times and cause not in _BY_CHANCE]
        missed += ["the end"] if "ended early" in self.notes else []
        return missed + (["deliveries"] if self.deliveries < self.wanted_deliveries else [])

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


def report(evidence: Evidence, seed: int, seconds: float) -> Report:
    """Judges a run."""
    times = Counter(deed.kind for deed in evidence.deeds)
    hits = Counter(deed.kind for deed in evidence.deeds if deed.hit)
    return Report(
        seed, seconds,
        len(evidence.deliveries), wanted_hits(seconds), int(_DELIVERIES * min(1.0, seconds / FULL_SECONDS)),
        dict(Counter(one.state for one in evidence.deliveries)), judge(evidence), causes(evidence),
        [Tally(kind, times[kind], hits[kind]) for kind in KINDS],
        {str(trouble): evidence.troubles[str(trouble)] for trouble in _TROUBLES}, evidence.notes,
    )  # fmt: skip


def _counts(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, "times", box=None, pad_edge=False)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    return table


def _of_mail_servers(troubles: Mapping[str, int]) -> Table:
    """What they did to mails that they had not accepted, by the stage of the protocol."""
    stages = ["end" if stage is Stage.BODY else stage.value for stage in Stage]
    table = Table("what a mail server did", *stages, box=None, pad_edge=False)
    for act in Act:
        row = [str(Trouble(stage, act)) for stage in Stage]
        if any(one in troubles for one in row):
            table.add_row(act.value, *(f"{troubles[one]:,}" if one in troubles else "" for one in row))
    return table


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
    console.print(_counts("what excuses a duplicate", report.causes))
    console.print()
    console.print(_of_mail_servers(report.troubles))
    console.print()
    others = [*(one for one in OF_MAILS if one.accepted), *HttpTrouble]
    console.print(_counts("what else a server did", {str(one): report.troubles[str(one)] for one in others}))
    console.print()
    faults = Table("fault", "times", "hit work in flight", box=None, pad_edge=False)
    for tally in report.tallies:
        faults.add_row(tally.kind, f"{tally.times:,}", f"{tally.hits:,}")
    console.print(faults)
    console.print()
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(report.states.items()))
    console.print(
        f"deliveries: {report.deliveries:,} (wanted: {report.wanted_deliveries:,}): {states}", highlight=False
    )
    for name, note in report.notes.items():
        console.print(f"{name}: {note}", highlight=False)
    missed = f" (not exercised enough: {', '.join(report.missed)}; wanted hits: {report.wanted_hits})"
    console.print(
        f"seed {report.seed}, {report.seconds:g} s: [bold]{_WORDS[report.exit_code]}[/bold]"
        + (missed if report.missed else ""),
        highlight=False,
        soft_wrap=True,
    )
