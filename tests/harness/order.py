"""The order of the tests when several workers share them: what takes long comes first, at each worker some of it.

A worker begins with an equal part of the list and takes from the ends of others' when it has done its own
(`--dist worksteal`). So the tests of a file stay together and share what their module has made, and at the end there is
only what is short. Every worker must come to the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pytest

# Half a minute of one test, or of a file whose tests share what takes long to make; the longest first.
_LONG = (
    "tests/faults/test_run.py",
    "tests/migrations/test_previous_release.py",
    "tests/devstack/test_run.py::test_the_whole_system",
    "tests/console/test_page.py",
    "tests/delivery_faults/test_run.py",
    "tests/servicekit/test_health.py",
    "tests/proof/test_machine.py",
    "tests/observability/test_running.py",
    "tests/system/test_system.py",
    "tests/manifests/test_wiring.py::test_the_whole_of_it_runs",
)
# Their tests have nothing in common.
_APART = frozenset({"tests/faults/test_run.py", "tests/delivery_faults/test_run.py", "tests/servicekit/test_health.py"})


def _rank(item: pytest.Item) -> int:
    return next((rank for rank, name in enumerate(_LONG) if item.nodeid.startswith(name)), len(_LONG))


def _groups(items: Sequence[pytest.Item]) -> list[list[pytest.Item]]:
    """The long ones, the longest first, in groups that one worker should run."""
    ranked = sorted((item for item in items if _rank(item) < len(_LONG)), key=_rank)
    groups: list[list[pytest.Item]] = []
    for rank, found in groupby(ranked, _rank):
        members = list(found)
        groups += [[one] for one in members] if _LONG[rank] in _APART else [members]
    return groups


def ordered(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The same tests, those that take long at the beginning of the workers' parts in turn."""
    groups = _groups(items)
    short = [item for item in items if _rank(item) == len(_LONG)]
    parts: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for number, group in enumerate(groups):
        # To and fro, so that no worker has the longer one of each pair.
        turn, place = divmod(number, workers)
        parts[place if turn % 2 == 0 else workers - 1 - place] += group
    size, taken = len(items) // workers, 0
    for number, part in enumerate(parts):
        last = number == workers - 1
        count = len(short) - taken if last else max(size - len(part), 0)
        part += short[taken : taken + count]
        taken += count
    return [item for part in parts for item in part]
