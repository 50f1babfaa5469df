"""How late watchers hear of a change at 200 a second, against NATS JetStream: 1 watcher and 100.

From when a change was to be sent (arrivals do not wait for answers) until a watcher has parsed it: the way through
CreateUser, a group commit with fsync and WatchUsers against that through a publish, a stream in a file with fsync and
an ordered consumer. On both sides the sender is one process and all watchers are another, on one connection. Rounds
take turns; the first second of each is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import nats as nats_client

from bench import rivals
from bench.measure import Sizes, Value, ratios
from bench.reading import STREAM, SUBJECT
from bench.stack import Stack, processor, result

SIZES = Sizes(rounds=5, seconds=10)
QUICK = Sizes(rounds=2, seconds=3)

_RATE = 200
_WATCHERS = (1, 100)


async def _round(stack: Stack, what: str, address: str, watchers: int, seconds: int) -> dict[str, Any]:
    events = _RATE * (seconds + 1)
    watching = await stack.live(
        "bench.watching", what, "--address", address, "--watchers", watchers, "--events", events, "--timed", _RATE
    )
    await stack.measure("bench.sending", what, "--address", address, "--rate", _RATE, "--events", events)
    heard = await result(watching)
    if heard["events"] != _RATE * seconds * watchers:
        raise RuntimeError(f"{what}: {heard['events']} events were heard of, {_RATE * seconds * watchers} sent")
    return heard


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """By turns: the feed and NATS, with one watcher and with many."""
    async with rivals.nats(stack.directory / "nats") as nats:
        print(f"# {nats.says}")
        client = await nats_client.connect(nats.address)
        await client.jetstream().add_stream(name=STREAM, subjects=[SUBJECT], storage="file")
        await client.close()
        service = await stack.users()
        sides = {
            "feed": (service, {"server": stack.pids[service], "Postgres": stack.postgres_pid}),
            "nats": (nats.address, {"server": nats.pid}),
        }
        measured: defaultdict[tuple[str, int, str], list[float]] = defaultdict(list)
        for number in range(-1, sizes.rounds):
            for watchers in _WATCHERS:
                for what, (address, pids) in sides.items():
                    before = {side: processor(pid) for side, pid in pids.items()}
                    heard = await _round(stack, what, address, watchers, sizes.seconds if number >= 0 else 1)
                    if number < 0:  # warms up
                        continue
                    measured[what, watchers, "p50"].append(heard["p50"] * 1000)
                    measured[what, watchers, "p99"].append(heard["p99"] * 1000)
                    measured[what, watchers, "watchers"].append(heard["processor"])
                    for side, pid in pids.items():
                        measured[what, watchers, side].append(processor(pid) - before[side])
        for (what, watchers, name), values in measured.items():
            unit = "ms" if name in ("p50", "p99") else "processor s"
            yield Value(f"latency, {what}, {watchers} watching, {name}", unit, tuple(values))
        for watchers in _WATCHERS:
            for name in ("p50", "p99"):
                yield ratios(
                    f"latency / NATS, {watchers} watching, {name}",
                    measured["feed", watchers, name],
                    measured["nats", watchers, name],
                )
