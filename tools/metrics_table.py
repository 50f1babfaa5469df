"""Writes the tables of docs/metrics.md from the instruments of the code: `python -m tools.metrics_table`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import migrations.metrics
import notification_service.metrics
import servicekit.metrics
import user_service.metrics
from servicekit.instruments import LONG_SECONDS, SECONDS, Histogram, Instrument

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
_TABLES: tuple[tuple[str, Sequence[Instrument]], ...] = (
    ("Both services", servicekit.metrics.INSTRUMENTS),
    ("User service", user_service.metrics.INSTRUMENTS),
    ("Notification service", notification_service.metrics.INSTRUMENTS),
    ("Migrations", migrations.metrics.INSTRUMENTS),
)
# What stands in the document before the tables, by a person.
_BEGIN = "<!-- From here on written by python -m tools.metrics_table -->\n"
_BOUNDS = {SECONDS: "", LONG_SECONDS: " Buckets to 300 s."}


def _row(one: Instrument) -> str:
    note = ""
    if isinstance(one, Histogram):
        known = _BOUNDS.get(one.bounds)
        note = " Buckets: " + ", ".join(f"{bound:g}" for bound in one.bounds) + "." if known is None else known
    attributes = "<br>".join(f"`{name}`" for name in one.attributes)
    cells = (f"`{one.name}`<br>`{one.prometheus_name}`", one.kind, one.unit, attributes, one.description + note)
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """The tables, one for each process."""
    lines = []
    for title, instruments in _TABLES:
        lines += ["", f"## {title}", "", "| OpenTelemetry, Prometheus | kind | unit | attributes | what |"]
        lines += ["| --- | --- | --- | --- | --- |", *map(_row, instruments)]
    return "\n".join(lines) + "\n"


def document(text: str) -> str:
    """The document with the tables of the code."""
    before, begin, _ = text.partition(_BEGIN)
    return before + begin + tables()


def main() -> int:
    """Writes the document."""
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
