"""Instruments: what a process measures, each declared once, kept in plain numbers.

To measure costs a look-up and two additions; what the OpenTelemetry SDK does for each of its measurements costs ten
times as much, which a call would notice. `servicekit.metrics_export` hands the numbers to the SDK when they are asked
for.

What always holds: a series has the attributes that its instrument declares and no others; only the thread of the event
loop writes, any thread may read. What is read may lack a part of the measurement that is being made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import ClassVar, Generic, Protocol, TypeVar

# Upper bounds of buckets, in seconds: of what takes part in a call, and of the whole way of a change.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_SECONDS = (*SECONDS, 30.0, 60.0, 300.0)

_SUFFIXES = {"s": "_seconds", "By": "_bytes"}

# The values of a series' attributes, in the order of their declaration.
Values = tuple[str, ...]


class Tally:
    """One series of a histogram. `counts` are those of each bucket, the last for what is beyond every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def record(self, value: float) -> None:
        """Counts a value; a bound is part of the bucket below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, more: int) -> None:
        """Counts more."""
        self.value += more


class Instrument(Protocol):
    """What all kinds have: OpenTelemetry's name, unit (UCUM) and description, and the keys of every series."""

    kind: ClassVar[str]
    name: str
    unit: str
    description: str
    attributes: Values

    @property
    def prometheus_name(self) -> str:
        """Its name as Prometheus has it; a histogram's has `_bucket`, `_sum` and `_count` besides."""
        ...


class _Declared:
    kind: ClassVar[str]

    def __init__(self, name: str, unit: str, description: str, *attributes: str) -> None:
        self.name = name
        self.unit = unit
        self.description = description
        self.attributes = attributes

    @property
    def prometheus_name(self) -> str:
        """Its name as Prometheus has it; a histogram's has `_bucket`, `_sum` and `_count` besides."""
        name, suffix = self.name.replace(".", "_"), _SUFFIXES.get(self.unit, "")
        return (name if name.endswith(suffix) else name + suffix) + ("_total" if self.kind == "counter" else "")


_Series = TypeVar("_Series", Tally, Count)


class _Kept(_Declared, Generic[_Series]):
    """Keeps a series for each combination of values."""

    def __init__(self, name: str, unit: str, description: str, *attributes: str) -> None:
        super().__init__(name, unit, description, *attributes)
        self._series: dict[Values, _Series] = {}

    def _made(self) -> _Series:
        raise NotImplementedError

    def of(self, *values: str) -> _Series:
        """The series with these values, which must be few in all."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self.attributes):
                raise TypeError(f"{self.name}: {values} are not values of {self.attributes}")
            series = self._series[values] = self._made()
        return series

    def series(self) -> list[tuple[Values, _Series]]:
        """All series so far."""
        return list(self._series.items())


class Histogram(_Kept[Tally]):
    """How often which values were measured."""

    kind = "histogram"

    def __init__(
        self, name: str, unit: str, description: str, *attributes: str, bounds: tuple[float, ...] = SECONDS
    ) -> None:
        super().__init__(name, unit, description, *attributes)
        self.bounds = bounds

    def _made(self) -> Tally:
        return Tally(self.bounds)


class Counter(_Kept[Count]):
    """What has happened since the start."""

    kind = "counter"

    def _made(self) -> Count:
        return Count()


class Gauge(_Declared):
    """What is now. `read` is asked in a thread that is not the event loop's: it only looks at plain attributes. It
    gives the values of the attributes and the number of each series; there are none until it is set.
    """

    kind = "gauge"
    read: Callable[[], Iterable[tuple[Values, float]]]

    def __init__(self, name: str, unit: str, description: str, *attributes: str) -> None:
        super().__init__(name, unit, description, *attributes)
        self.read = tuple

    def read_one(self, read: Callable[[], float | None]) -> None:
        """Has one series, and none while `read` gives None."""

        def series() -> Iterable[tuple[Values, float]]:
            value = read()
            return () if value is None else (((), value),)

        self.read = series
