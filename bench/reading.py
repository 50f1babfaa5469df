"""Reads a log from its beginning in a process of its own, and prints one JSON object at its end.

python -m bench.reading feed --address A --events 1000000
python -m bench.reading nats --address A --events 1000000 --parse

`feed` is `tidings.client.UserFeed` as it comes, whose events are parsed. `nats` is nats-py's ordered consumer with a
callback: by trial three times as fast as its iterator and as pulls in large batches. `redis` is redis-py with hiredis,
blocking, XRANGE COUNT 1000: by trial as fast as XREAD and faster than larger counts. They hand out payloads;
with --parse each is parsed into a UserEvent, as the feed does for its user. What was read is counted and summed up in
the loop, so that nothing can be left for later. Only the client that is used is imported, before time is taken: what
one has in memory, which Python's garbage collector walks, is no burden to another.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import uvloop

from tidings.users.v1 import users_pb2

# Where NATS and Redis have the events; FIELD is that of a Redis entry.
SUBJECT, STREAM, FIELD = "users", "users", b"e"

_parsed = users_pb2.UserEvent.FromString


async def feed(address: str, events: int, parse: bool) -> int:
    """The sum of the positions of the first `events` events."""
    from tidings.client import UserFeed, connect

    seen = positions = 0
    async with connect(address) as channel, aclosing(aiter(UserFeed(channel))) as batches:
        async for batch in batches:
            for event in batch.events:
                seen += 1
                positions += event.position
            if seen >= events:
                break
    return positions


async def jetstream(address: str, events: int, parse: bool) -> int:
    """The sum of the positions, or of the lengths if payloads are not parsed."""
    import nats

    client = await nats.connect(address)
    done = asyncio.Event()
    seen = total = 0

    async def take(message: Any) -> None:
        nonlocal seen, total
        seen += 1
        total += _parsed(message.data).position if parse else len(message.data)
        if seen == events:
            done.set()

    # nats-py drops what is beyond its limits, which costs the consumer a restart.
    await client.jetstream().subscribe(
        SUBJECT, cb=take, ordered_consumer=True, pending_msgs_limit=1 << 40, pending_bytes_limit=1 << 40
    )
    await done.wait()
    await client.close()
    return total


async def streams(address: str, events: int, parse: bool) -> int:
    """The sum of the positions, or of the lengths if payloads are not parsed."""
    import redis

    host, _, port = address.partition(":")
    seen = total = 0
    last = b"-"
    with redis.Redis(host=host, port=int(port)) as client:
        while seen < events:
            entries: Any = client.xrange(STREAM, last, count=1000)
            for _, fields in entries:
                seen += 1
                total += _parsed(fields[FIELD]).position if parse else len(fields[FIELD])
            last = b"(" + entries[-1][0]
    return total


_READERS: dict[str, Callable[[str, int, bool], Coroutine[Any, Any, int]]] = {
    "feed": feed,
    "nats": jetstream,
    "redis": streams,
}


_LIBRARIES = {"feed": "tidings.client", "nats": "nats", "redis": "redis"}


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=_READERS)
    parser.add_argument("--address", required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--parse", action="store_true")
    asked = parser.parse_args()
    importlib.import_module(_LIBRARIES[asked.what])
    processor, begun = time.process_time(), time.perf_counter()
    total = uvloop.run(_READERS[asked.what](asked.address, asked.events, asked.parse))
    took = time.perf_counter() - begun
    print(json.dumps({"seconds": took, "processor": time.process_time() - processor, "sum": total}))


if __name__ == "__main__":
    main()
