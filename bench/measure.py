"""What a benchmark yields: named values over several rounds, printed with median and spread, and kept as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a benchmark does: rounds, seconds of each, and events in the log or in a round. What a benchmark has no
    use for is 0.
    """

    rounds: int
    seconds: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Value:
    """One figure, measured in every round."""

    name: str
    unit: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        digits = 3 if self.unit == "ratio" else 2 if self.median < 100 else 0
        low, high = min(self.rounds), max(self.rounds)
        spread = f"  [{low:.{digits}f} .. {high:.{digits}f}, {len(self.rounds)} rounds]" if len(self.rounds) > 1 else ""
        return f"{self.name}: {self.median:.{digits}f} {self.unit}{spread}"


def ratios(name: str, above: Sequence[float], below: Sequence[float]) -> Value:
    """The ratio round by round: both sides of a round saw the same machine."""
    return Value(name, "ratio", tuple(a / b for a, b in zip(above, below, strict=True)))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values are at or below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def write(path: Path, values: Sequence[Value]) -> None:
    """Keeps the values of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [
        {"name": value.name, "unit": value.unit, "median": value.median, "rounds": list(value.rounds)}
        for value in values
    ]
    path.write_text(json.dumps(kept, indent=2) + "\n")
