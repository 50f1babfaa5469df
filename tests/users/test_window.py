"""The window in memory: always a contiguous run that ends at the head, bounded, and nobody waits in vain."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from user_service.events import Entry
from user_service.window import Window

_TIME = datetime(2030, 1, 1, tzinfo=UTC)


def _entries(first: int, sizes: list[int]) -> list[Entry]:
    return [
        Entry(position, position.to_bytes(16, "big"), True, _TIME, bytes(size), None, b"", 0, 0)
        for position, size in enumerate(sizes, first)
    ]


@given(st.integers(0, 50), st.lists(st.lists(st.integers(0, 400), max_size=20), max_size=20), st.integers(500, 5000))
def test_what_is_held(head: int, batches: list[list[int]], limit: int) -> None:
    window = Window(limit)
    window.reset(head, None)
    sizes: dict[int, int] = {}
    for batch in batches:
        entries = _entries(window.head + 1, batch)
        window.append(entries)
        sizes |= {entry.position: entry.size for entry in entries}
        held = window.after(window.first - 1, 10_000)
        assert [entry.position for entry in held] == list(range(window.first, window.head + 1))
        assert window.bytes == sum(entry.size for entry in held) <= limit
        # What was dropped had to be: with one more the strides would be over the limit again.
        assert window.covers(window.head)
        assert window.covers(window.first - 1)
        assert not window.covers(window.first - 2)
        for position in range(window.first, window.head + 1):
            found = window.at(position)
            assert found is not None
            assert found.position == position
        assert window.at(window.first - 1) is None
        assert window.at(window.head + 1) is None
    assert window.head == head + len(sizes)


async def test_a_gap_is_refused_and_what_is_known_is_left_out() -> None:
    window = Window(1 << 20)
    window.reset(3, None)
    with pytest.raises(ValueError, match="position 5 where 4 follows"):
        window.append(_entries(5, [1]))
    assert window.head == 3
    window.append(_entries(2, [1, 1, 1, 1]))
    assert (window.first, window.head) == (4, 5)


async def test_an_event_wakes_all_who_wait_and_time_the_rest() -> None:
    window = Window(1 << 20)
    loop = asyncio.get_running_loop()
    waiting = [asyncio.create_task(window.wait(loop.time() + 60)) for _ in range(50)]
    late = asyncio.create_task(window.wait(loop.time() + 0.01))
    await late
    assert not any(task.done() for task in waiting)
    window.append(_entries(1, [1]))
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    gone = asyncio.create_task(window.wait(loop.time() + 60))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    window.wake_all()
