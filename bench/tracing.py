"""What traces cost: CreateUser and replay of services that export no spans, those of 1 % of the calls, and all.

The services stand on one database and take turns; spans go by OTLP to a process that throws them away. A replay makes
no spans, whatever is sampled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator

from bench import filling
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack

SIZES = Sizes(rounds=9, seconds=4, events=300_000)
QUICK = Sizes(rounds=3, seconds=2, events=50_000)

_CALLERS = 64
_OFF = "off"
_SHARES = {"1 %": "0.01", "100 %": "1"}


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """CreateUser on one database, replay of another."""
    log = await stack.database("log")
    await filling.fill(log, sizes.events)
    sink = await stack.floor("bench.sink")

    async def replicas(url: str) -> dict[str, str]:
        common = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{sink}", "OTEL_METRICS_EXPORTER": "none"}
        cache = {"TIDINGS_USERS_PAGE_CACHE_BYTES": str(1 << 20)}
        made = {_OFF: await stack.users(url, **cache)}
        for name, share in _SHARES.items():
            sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": share}
            made[name] = await stack.users(url, **common, **sampler, **cache)
        return made

    creating, reading = await replicas(stack.url), await replicas(log)
    created: defaultdict[str, list[float]] = defaultdict(list)
    read: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(-1, sizes.rounds):
        for name, address in _by_turns(creating, number):
            calls = await stack.run("create", [address], callers=_CALLERS, seconds=sizes.seconds)
            if number >= 0:
                created[name].append(calls["per_second"])
    await filling.sealed(log)
    for number in range(-1, sizes.rounds):
        for name, address in _by_turns(reading, number):
            replay = await stack.measure("bench.reading", "feed", "--address", address, "--events", sizes.events)
            if number >= 0:
                read[name].append(sizes.events / replay["seconds"])
    for what, unit, measured in (("CreateUser", "users/s", created), ("replay", "events/s", read)):
        for name, values in measured.items():
            yield Value(f"{what}, traces {name}", unit, tuple(values))
        for name in _SHARES:
            yield ratios(f"{what}, traces {name} / {_OFF}", measured[name], measured[_OFF])


def _by_turns(addresses: dict[str, str], number: int) -> list[tuple[str, str]]:
    """Each is first, second and third equally often: who comes first finds colder caches."""
    named = list(addresses.items())
    first = number % len(named)
    return named[first:] + named[:first]
