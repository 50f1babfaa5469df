"""A log read from its beginning: the feed, parsed by the client, against psql, NATS JetStream and Redis Streams.

All read the same events. The feed is `tidings.client.UserFeed` against a service whose window is empty and whose page
cache is too small for a log of any size, so that everything comes from Postgres. psql copies the same rows in binary
to /dev/null, from a plain copy of the table, in order of position. NATS and Redis hold each event as a message of its
own: their clients hand out bytes ("bytes"), or each is parsed into a UserEvent as the feed does ("parsed"). Rounds take
turns; the time is from before a client connects until it has handed out the last event, psql's that of its process.
All files are in the page cache. NATS' stream is filled by a server that syncs less often and read from one that always
does, which makes no difference to a read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from bench import filling, rivals
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack, processor

SIZES = Sizes(rounds=5, events=1_000_000)
QUICK = Sizes(rounds=2, events=50_000)

_FEED, _PSQL = "feed, parsed", "psql COPY binary"
_COPY = f"COPY (SELECT position, element FROM {filling.PLAIN} ORDER BY position) TO STDOUT (FORMAT binary)"


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """Fills all four logs, then reads them in turns."""
    await filling.fill(stack.url, sizes.events, plain=True)
    async with AsyncExitStack() as running:
        nats_directory = stack.directory / "nats"
        async with rivals.nats(nats_directory, sync_interval='"1m"') as filled:
            await rivals.fill_nats(filled, filling.bodies(stack.url))
        nats = await running.enter_async_context(rivals.nats(nats_directory))
        redis = await running.enter_async_context(rivals.redis(stack.directory / "redis"))
        await rivals.fill_redis(redis, filling.bodies(stack.url))
        service = await stack.users(TIDINGS_USERS_PAGE_CACHE_BYTES=str(1 << 20))
        await filling.sealed(stack.url)
        readers = {
            _FEED: ("feed", service, (stack.pids[service], stack.postgres_pid), ()),
            "NATS, bytes": ("nats", nats.address, (nats.pid,), ()),
            "NATS, parsed": ("nats", nats.address, (nats.pid,), ("--parse",)),
            "Redis, bytes": ("redis", redis.address, (redis.pid,), ()),
            "Redis, parsed": ("redis", redis.address, (redis.pid,), ("--parse",)),
        }
        print(f"# {nats.says}\n# {redis.says}")
        speeds: defaultdict[str, list[float]] = defaultdict(list)
        costs: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(-1, sizes.rounds):
            for name, (what, address, pids, options) in readers.items():
                before = [processor(pid) for pid in pids]
                read = await stack.measure(
                    "bench.reading", what, "--address", address, "--events", sizes.events, *options
                )
                if "bytes" not in name and read["sum"] != sizes.events * (sizes.events + 1) // 2:
                    raise RuntimeError(f"{name}: not every event was read once")
                if number >= 0:  # the round before the first warms caches
                    speeds[name].append(sizes.events / read["seconds"])
                    costs[f"{name}: client"].append(read["processor"])
                    for side, pid, used in zip(("server", "Postgres"), pids, before, strict=False):
                        costs[f"{name}: {side}"].append(processor(pid) - used)
            used = processor(stack.postgres_pid)
            copied = await stack.psql(stack.url, _COPY)
            if number >= 0:
                speeds[_PSQL].append(sizes.events / copied["seconds"])
                costs[f"{_PSQL}: client"].append(copied["processor"])
                costs[f"{_PSQL}: Postgres"].append(processor(stack.postgres_pid) - used)
        for name, values in speeds.items():
            yield Value(f"replay, {name}", "events/s", tuple(values))
        for name, values in costs.items():
            yield Value(f"replay, {name}", "processor s", tuple(values))
        for name in speeds:
            if name != _FEED:
                yield ratios(f"replay / {name}", speeds[_FEED], speeds[name])
