"""What a run proved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.delivery_faults.evidence import Evidence
from tests.delivery_faults.kinds import KINDS
from tests.delivery_faults.promises import BY_OUTAGE, NOT_READ, causes, judge
from tests.faultrun.report import RunReport, share, wanted_hits
from tests.harness.bad_http import Trouble as HttpTrouble
from tests.harness.bad_smtp import OF_CONNECTIONS, OF_MAILS, Act, Stage, Trouble
from tests.proof.exercise import Tally

# What a run of full length must have delivered; shorter runs in proportion.
_DELIVERIES = 5_000
# What the run does not bring about at will.
_BY_CHANCE = (BY_OUTAGE, NOT_READ)
_TROUBLES = (*OF_CONNECTIONS, *OF_MAILS, *HttpTrouble)


@dataclass(frozen=True)
class Report(RunReport):
    """The result of a run."""

    deliveries: int
    wanted_deliveries: int
    states: dict[str, int]
    causes: dict[str, int]
    troubles: dict[str, int]

    def unexercised(self) -> Iterator[str]:
        yield from (trouble for trouble, times in self.troubles.items() if times < self.wanted_hits)
        yield from (cause for cause, times in self.causes.items() if not times and cause not in _BY_CHANCE)
        if self.deliveries < self.wanted_deliveries:
            yield "deliveries"

    def show(self, console: Console) -> None:
        self.show_promises(console)
        console.print(_counts("what excuses a duplicate", self.causes))
        console.print()
        console.print(_of_mail_servers(self.troubles))
        console.print()
        others = [*(one for one in OF_MAILS if one.accepted), *HttpTrouble]
        console.print(_counts("what else a server did", {str(one): self.troubles[str(one)] for one in others}))
        console.print()
        self.show_faults(console)
        states = ", ".join(f"{count:,} {state}" for state, count in sorted(self.states.items()))
        console.print(
            f"deliveries: {self.deliveries:,} (wanted: {self.wanted_deliveries:,}): {states}", highlight=False
        )
        self.show_verdict(console)


def report(evidence: Evidence, seed: int, seconds: float) -> Report:
    """Judges a run."""
    times = Counter(deed.kind for deed in evidence.deeds)
    hits = Counter(deed.kind for deed in evidence.deeds if deed.hit)
    return Report(
        seed, seconds, wanted_hits(seconds), judge(evidence),
        [Tally(kind, times[kind], hits[kind]) for kind in KINDS], evidence.notes,
        len(evidence.deliveries), int(_DELIVERIES * share(seconds)),
        dict(Counter(one.state for one in evidence.deliveries)), causes(evidence),
        {str(trouble): evidence.troubles[str(trouble)] for trouble in _TROUBLES},
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
