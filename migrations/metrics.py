"""What a run of the migrations measures: whether it succeeded, pushed at its end for who watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from servicekit import metrics
from servicekit.instruments import Gauge, Instrument

_SERVICE = "tidings-migrations"
_LONGEST = 2.0  # seconds

SUCCEEDED = Gauge(
    "tidings.migration.succeeded",
    "1",
    "Whether the last run brought a database to the newest revision: 1, or 0. Pushed by OTLP at the end of the run.",
    "tidings.database",
)
INSTRUMENTS: tuple[Instrument, ...] = (SUCCEEDED,)

_succeeded: dict[str, int] = {}
SUCCEEDED.read = lambda: [((name,), value) for name, value in _succeeded.items()]


@contextmanager
def upgrading(database: str) -> Iterator[None]:
    """Notes how the upgrade of a database ends."""
    _succeeded[database] = 0
    yield
    _succeeded[database] = 1


def push() -> None:
    """Pushes what was noted, if an endpoint is configured. Takes 2 s at most and raises nothing."""
    if _succeeded:
        metrics.push_once(_SERVICE, INSTRUMENTS, _LONGEST)
