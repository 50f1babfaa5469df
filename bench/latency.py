"""How late a watcher hears of a change: 200 creations a second, 1 and 100 watchers on one replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from bench.measure import Value, percentile
from bench.stack import Stack, result

_RATE = 200


async def run(stack: Stack, rounds: int, seconds: int) -> AsyncIterator[Value]:
    """Watchers in a process, the writer in another."""
    address = await stack.users()
    await stack.run("create", [address], callers=8, seconds=1)
    for watchers in (1, 100):
        p50, p99 = [], []
        for _ in range(rounds):
            watching = await stack.load("watch", [address], watchers=watchers, seconds=seconds + 3)
            assert watching.stdout is not None
            await watching.stdout.readline()
            writing = asyncio.create_task(stack.run("write", [address], rate=_RATE, seconds=seconds))
            late = (await result(watching))["late"]
            made = (await writing)["made"]
            if len(late) != made * watchers:
                raise RuntimeError(f"{len(late)} events arrived, {made * watchers} were sent")
            p50.append(percentile(late, 0.50) * 1000)
            p99.append(percentile(late, 0.99) * 1000)
        yield Value(f"commit to watcher, {watchers} watching, p50", "ms", tuple(p50))
        yield Value(f"commit to watcher, {watchers} watching, p99", "ms", tuple(p99))
