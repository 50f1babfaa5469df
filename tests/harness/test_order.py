"""What takes long begins first, and every test is run once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.order import _LONG, ordered


class Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def _items() -> list[Any]:
    short = [f"tests/{folder}/test_x.py::test_{number}" for folder in "abcdef" for number in range(40)]
    long = [name if "::" in name else f"{name}::test_{number}" for name in _LONG for number in range(3)]
    return [Item(name) for name in dict.fromkeys([*short[:100], *long, *short[100:]])]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 40])
def test_every_test_is_there_once_and_parts_begin_with_what_is_long(workers: int) -> None:
    items = _items()
    found = [one.nodeid for one in ordered(items, workers)]
    assert sorted(found) == sorted(one.nodeid for one in items)
    size = len(items) // workers
    begins = {found[number * size] for number in range(min(workers, len(_LONG)))}
    assert all(one.startswith(_LONG) for one in begins)
    # The same at every worker.
    assert found == [one.nodeid for one in ordered(_items(), workers)]
    # A file whose tests share what they need stays with one.
    pages = [at for at, name in enumerate(found) if name.startswith("tests/console/test_page.py")]
    assert pages == list(range(pages[0], pages[0] + len(pages)))
