"""Who waits is woken in turn: at once after a quiet time, else a few at a time, and nobody is left out."""

from __future__ import annotations

import asyncio

from user_service import waiters
from user_service.waiters import Waiters


def _waits(told: Waiters, names: range, order: list[int]) -> list[asyncio.Task[None]]:
    async def one(name: int) -> None:
        await told.wait(asyncio.get_running_loop().time() + 60)
        order.append(name)

    return [asyncio.create_task(one(name)) for name in names]


async def _passes(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_after_a_quiet_time_all_are_woken_without_a_pause() -> None:
    told = Waiters(lambda: False)
    order: list[int] = []
    tasks = _waits(told, range(10), order)
    await _passes(1)
    told.tell()
    await _passes(2)
    assert order == list(range(10))
    await asyncio.gather(*tasks)


async def test_a_crowd_is_woken_in_the_order_in_which_it_came_and_others_get_turns_between() -> None:
    told = Waiters(lambda: False)
    order: list[int] = []
    tasks = _waits(told, range(200), order)
    await _passes(1)
    told.tell()
    await _passes(2)
    assert 0 < len(order) <= waiters._AT_ONCE
    await asyncio.gather(*tasks)
    assert order == list(range(200))


async def test_who_comes_again_waits_behind_those_who_have_not_been_told_yet() -> None:
    told = Waiters(lambda: True)
    order: list[int] = []
    tasks = _waits(told, range(100), order)
    await _passes(1)
    told.tell()
    await _passes(2)
    first = len(order)
    assert first < 100
    # They have been told, and there is something new before the others have.
    tasks += _waits(told, range(100, 100 + first), order)
    await _passes(1)
    told.tell()
    await asyncio.gather(*tasks)
    assert order == list(range(100 + first))


async def test_who_has_heard_all_is_not_woken_for_it() -> None:
    told = Waiters(lambda: False)
    order: list[int] = []
    early = _waits(told, range(100), order)
    await _passes(1)
    told.tell()
    late = _waits(told, range(100, 101), order)
    await asyncio.gather(*early)
    await asyncio.sleep(3 * waiters._STEP)
    assert order == list(range(100))
    told.tell()
    await asyncio.gather(*late)


async def test_so_many_wake_ups_a_second_and_no_more() -> None:
    told, loop = Waiters(lambda: False), asyncio.get_running_loop()
    heard = 0

    async def follow() -> None:
        nonlocal heard
        while True:
            await told.wait(loop.time() + 60)
            heard += 1

    tasks = [asyncio.create_task(follow()) for _ in range(50)]
    begun = loop.time()
    while loop.time() < begun + 0.3:
        told.tell()
        await asyncio.sleep(0.001)
    took = loop.time() - begun
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert 50 <= heard <= 50 + took / waiters._WAKE_SECONDS


async def test_who_gives_up_is_forgotten() -> None:
    told = Waiters(lambda: False)
    order: list[int] = []
    tasks = _waits(told, range(3), order)
    await _passes(1)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    await told.wait(asyncio.get_running_loop().time() + 0.01)
    told.tell()
    await asyncio.gather(*tasks[1:])
    assert order == [1, 2]
