"""Slow subscribers and many of them: what they cost in memory, and what they do to the callers that create users.

The server's memory is its resident set. Callers create 50 users a second; their times count from when each was due.
- resuming: 1,000 streams begin together at the log's first event, and read to its head.
- live: 1,000 streams hear of each creation.
- stalled: 10 streams stop reading at the log's beginning while it grows.
- leaving: 200 clients open streams and cancel them at random, at their beginning, among old events, or live.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench import filling
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack, first_line, result

SIZES = Sizes(rounds=3, seconds=20, events=120_000)
QUICK = Sizes(rounds=1, seconds=5, events=20_000)

_CROWD = 1000
_STALLED = 10
_LEAVING = 200
_RATE = 50
_SAMPLES = 10


class _Server:
    """A replica with the loads against it."""

    def __init__(self, stack: Stack, address: str) -> None:
        self._stack = stack
        self._address = address
        self._process = psutil.Process(stack.pids[address])

    @property
    def megabytes(self) -> float:
        return float(self._process.memory_info().rss) / 2**20

    async def begin(self, what: str, streams: int = 1) -> asyncio.subprocess.Process:
        """Starts a load and waits until it is at work."""
        process = await self._stack.start(
            "bench.subscribers", what, "--address", self._address, "--streams", str(streams), "--rate", str(_RATE)
        )
        if await first_line(process) != "open":
            raise RuntimeError(f"{what} did not begin")
        return process

    @contextlib.asynccontextmanager
    async def during(self, what: str, streams: int) -> AsyncIterator[None]:
        """While a load goes on that ends when told to."""
        process = await self.begin(what, streams)
        try:
            yield
        finally:
            process.terminate()
            await result(process)

    async def callers(self, seconds: float, until: asyncio.subprocess.Process | None = None) -> dict[str, Any]:
        """What callers saw for some seconds, or until a process has ended."""
        probe = await self.begin("probe")
        if until is None:
            await asyncio.sleep(seconds)
        else:
            await until.wait()
        probe.terminate()
        return await result(probe)


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """One replica; by turns quiet and crowded."""
    await filling.fill(stack.url, sizes.events)
    server = _Server(stack, await stack.users(TIDINGS_USERS_MAX_STREAMS=str(2 * _CROWD)))
    await server.callers(2)
    for name, crowded in (("resuming", _resuming), ("live", _live), ("stalled", _stalled), ("leaving", _leaving)):
        quiet, during, seconds, memory = [], [], [], []
        for _ in range(sizes.rounds):
            quiet.append(await server.callers(sizes.seconds))
            before = server.megabytes
            seen, took = await crowded(server, sizes.seconds)
            during.append(seen)
            seconds.append(took)
            memory.append(server.megabytes - before)
        for share in ("p50", "p99"):
            values = [seen[share] for seen in during]
            yield Value(f"CreateUser, {name}, {share}", "ms", tuple(value * 1000 for value in values))
            yield ratios(f"CreateUser, {name} / quiet, {share}", values, [seen[share] for seen in quiet])
        yield Value(f"{name}, seconds", "s", tuple(seconds))
        yield Value(f"{name}, memory more than before", "MB", tuple(memory))


async def _resuming(server: _Server, seconds: float) -> tuple[dict[str, Any], float]:
    resuming = await server.begin("resume", _CROWD)
    seen = await server.callers(seconds, resuming)
    return seen, (await result(resuming))["seconds"]


async def _live(server: _Server, seconds: float) -> tuple[dict[str, Any], float]:
    async with server.during("live", _CROWD):
        return await server.callers(seconds), seconds


async def _stalled(server: _Server, seconds: float) -> tuple[dict[str, Any], float]:
    async with server.during("stall", _STALLED):
        return await server.callers(seconds), seconds


async def _leaving(server: _Server, seconds: float) -> tuple[dict[str, Any], float]:
    async with server.during("leave", _LEAVING):
        return await server.callers(seconds), seconds
