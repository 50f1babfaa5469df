"""What a check says: how many things it looked at, and which of them break the promise."""

from __future__ import annotations

from dataclasses import dataclass, field

_SHOWN = 20


@dataclass(slots=True)
class Verdict:
    """The result of the check of one promise. `examples` are the first breaks, in words."""

    promise: str
    checked: int = 0
    broken: int = 0
    examples: list[str] = field(default_factory=list)

    def breaks(self, example: str) -> None:
        """Notes a break."""
        self.broken += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(example)
