"""The first event after a resume, in a long log and in a short one: it should not matter how long the log is.

Each resume is a new stream of `tidings.client.UserFeed` with a token, on a connection that is open already, until it
has handed out the first batch. Tokens stand at places drawn over the whole log, for both logs equally far into a page.
Services have just been started, so that nothing is in their windows, and keep few pages. A pass over the places comes
before the first round, so that what is read is in the page cache of the system.

python -m bench.resumption --address A < tokens
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

import psycopg
import uvloop

from bench import filling
from bench.measure import Sizes, Value, percentile, ratios
from bench.stack import Stack
from tidings.client import MemoryCursor, UserFeed, connect
from user_service import tokens

SIZES = Sizes(rounds=7, events=10_000_000)
QUICK = Sizes(rounds=3, events=200_000)

_SHORT = 100_000
_PLACES = 200
# Places are this far apart at least, and this far from the head.
_PAGE = 1000


def _places(length: int) -> list[int]:
    """Positions to resume after; those of logs of two lengths are alike but for their page."""
    inside, chance = random.Random(1), random.Random(2)
    return [chance.randrange(length // _PAGE - 1) * _PAGE + inside.randrange(1, _PAGE) for _ in range(_PLACES)]


async def _tokens(url: str, places: list[int]) -> list[str]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        ((log_id,),) = await (await connection.execute("SELECT log_id FROM feed")).fetchall()
        cursor = await connection.execute(
            "SELECT position, event_id FROM user_events WHERE position = ANY(%s)", [places]
        )
        ids: dict[int, uuid.UUID] = dict(await cursor.fetchall())
    return [tokens.encode(tokens.ResumeToken(log_id, place, tokens.event_hash(ids[place].bytes))) for place in places]


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """Fills both logs, then resumes in each by turns."""
    logs = {"long": (await stack.database("long"), sizes.events), "short": (stack.url, _SHORT)}
    names = {"long": f"log of {sizes.events:,}", "short": f"log of {_SHORT:,}"}
    services, cursors = {}, {}
    for log, (url, length) in logs.items():
        await filling.fill(url, length)
        cursors[log] = "\n".join(await _tokens(url, _places(length)))
        services[log] = await stack.users(url, TIDINGS_USERS_PAGE_CACHE_BYTES=str(1 << 20))
        await filling.sealed(url)
    medians: dict[str, list[float]] = {log: [] for log in logs}
    tails: dict[str, list[float]] = {log: [] for log in logs}
    for number in range(-1, sizes.rounds):
        for log in logs:
            took = await stack.measure("bench.resumption", "--address", services[log], told=cursors[log])
            if number >= 0:
                medians[log].append(statistics.median(took["seconds"]) * 1000)
                tails[log].append(percentile(took["seconds"], 0.99) * 1000)
    for log in logs:
        yield Value(f"first event after a resume, {names[log]}, median of {_PLACES}", "ms", tuple(medians[log]))
        yield Value(f"first event after a resume, {names[log]}, p99", "ms", tuple(tails[log]))
    yield ratios("first event after a resume, long log / short log", medians["long"], medians["short"])


async def _resume(address: str, cursors: list[str]) -> dict[str, list[float]]:
    seconds = []
    async with connect(address) as channel:
        await channel.channel_ready()
        for token in cursors:
            begun = time.perf_counter()
            async with aclosing(aiter(UserFeed(channel, cursor=MemoryCursor(token)))) as batches:
                async for _ in batches:
                    break
                seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds}


def main() -> None:
    """Reads the arguments and tokens, resumes, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    asked = parser.parse_args()
    print(json.dumps(uvloop.run(_resume(asked.address, sys.stdin.read().split()))))


if __name__ == "__main__":
    main()
