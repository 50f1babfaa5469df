"""A burst of events to 100 live watchers, against grpc.aio that sends prepared bytes to as many.

The burst is committed by COPY beside the service, as another replica would commit it; from then until the last of the
watchers has parsed the last event and looked at each. The ceiling sends messages of as many events as the feed's had
on average: once to watchers that parse and look likewise ("parsed"), once to watchers that take bytes ("bytes").
Watchers are spread over as many processes as the machine has processors, less one for the server, each with one
connection. Rounds take turns.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import psycopg

from bench import filling
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack, processor, result

SIZES = Sizes(rounds=5, events=20_000)
QUICK = Sizes(rounds=2, events=5_000)

_WATCHERS = 100
_PROCESSES = max(1, min(_WATCHERS, (os.cpu_count() or 1) - 1))


async def _watching(stack: Stack, what: str, address: str, events: int) -> list[asyncio.subprocess.Process]:
    shares = [len(range(number, _WATCHERS, _PROCESSES)) for number in range(_PROCESSES)]
    options = ("--address", address, "--events", events)
    return await asyncio.gather(
        *(stack.live("bench.watching", what, *options, "--watchers", share) for share in shares)
    )


async def _feed(stack: Stack, address: str, events: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds, and what the processes of watchers tell."""
    watching = await _watching(stack, "feed", address, events)
    async with await psycopg.AsyncConnection.connect(stack.url, autocommit=True) as connection:
        head = await filling.append(connection, events)
    begun = time.perf_counter()
    told = await asyncio.gather(*map(result, watching))
    positions = sum(range(head - events + 1, head + 1))
    if sum(one["positions"] for one in told) != positions * _WATCHERS:
        raise RuntimeError("not every watcher had every event once")
    return max(one["last"] for one in told) - begun, told


async def _ceiling(stack: Stack, what: str, address: str, events: int) -> tuple[float, list[dict[str, Any]]]:
    told = await asyncio.gather(*map(result, await _watching(stack, what, address, events)))
    return max(one["last"] for one in told) - max(one["live"] for one in told), told


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """By turns: the feed, the ceiling parsed, the ceiling as bytes."""
    service = await stack.users()
    _, told = await _feed(stack, service, sizes.events)
    batch = round(sizes.events * _WATCHERS / sum(one["messages"] for one in told))
    messages = -(-sizes.events // batch)
    ceiling = await stack.floor(
        "bench.prepared", "--streams", str(_WATCHERS), "--messages", str(messages), "--batch", str(batch)
    )
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    costs: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    batches = []
    for _ in range(sizes.rounds):
        for what in ("feed", "parsed", "bytes"):
            address = service if what == "feed" else ceiling
            events = sizes.events if what == "feed" else messages * batch
            used = processor(stack.pids[address])
            if what == "feed":
                seconds, told = await _feed(stack, address, events)
                batches.append(events * _WATCHERS / sum(one["messages"] for one in told))
            else:
                seconds, told = await _ceiling(stack, what, address, events)
            speeds[what].append(events * _WATCHERS / seconds)
            costs[what, "watchers"].append(sum(one["processor"] for one in told))
            costs[what, "server"].append(processor(stack.pids[address]) - used)
    yield Value("fan-out, events in a message of the feed", "events", tuple(batches))
    yield Value("fan-out, events in a message of the ceiling", "events", (float(batch),))
    for what, values in speeds.items():
        yield Value(f"fan-out to {_WATCHERS}, {what}", "deliveries/s", tuple(values))
    for (what, side), values in costs.items():
        yield Value(f"fan-out to {_WATCHERS}, {what}: {side}", "processor s", tuple(values))
    for what in ("parsed", "bytes"):
        yield ratios(f"fan-out / ceiling, {what}", speeds["feed"], speeds[what])
