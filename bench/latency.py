"""How late a watcher hears of a change: 200 creations a second, 1 and 100 watchers on one replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from bench.measure import Value
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
            heard = await result(watching)
            made = (await writing)["made"]
            if heard["events"] != made * watchers:
                raise RuntimeError(f"{heard['events']} events arrived, {made * watchers} were sent")
            p50.append(heard["p50"] * 1000)
            p99.append(heard["p99"] * 1000)
        yield Value(f"commit to watcher, {watchers} watching, p50", "ms", tuple(p50))
        yield Value(f"commit to watcher, {watchers} watching, p99", "ms", tuple(p99))
