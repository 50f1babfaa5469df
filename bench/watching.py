"""Watchers in a process of their own: all on one connection, each with a stream of its own that it reads to the end.

python -m bench.watching feed --address A --watchers 100 --events 20000
python -m bench.watching nats --address A --watchers 100 --events 2000 --timed 200

Prints "live" once every watcher would hear of what happens next; one JSON object when each has had `events` events.
`feed` is `tidings.client.UserFeed`. `parsed` and `bytes` are what bench.prepared sends, through grpc.aio alone, with
each event looked at as a watcher of the feed does, or with messages left as they come. `nats` is nats-py's ordered
consumer with a callback that parses each message into a UserEvent. With `--timed N` usernames say when something was
to be sent (bench.sending) and how late each event is heard of is told, without the first N events of each watcher.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, cast

import grpc.aio
import uvloop

from bench.measure import percentile
from bench.reading import SUBJECT
from tidings.client import UserFeed, connect
from tidings.users.v1 import users_pb2

_message = users_pb2.WatchUsersResponse.FromString
# A username that says when its user was to be sent, in nanoseconds of `time.perf_counter`.
DUE = "due-"
_METHOD = "/tidings.users.v1.UserService/WatchUsers"


class Heard:
    """What the watchers of this process have heard."""

    def __init__(self, watchers: int, events: int, skip: int | None) -> None:
        self.events = events
        self.messages = 0
        self.positions = 0
        self.late: list[float] = []
        self._skip = skip
        self._not_live = watchers
        self.live = 0.0
        self._processor = 0.0

    def is_live(self) -> None:
        """One more watcher is."""
        self._not_live -= 1
        if not self._not_live:
            self.live, self._processor = time.perf_counter(), time.process_time()
            sys.stdout.write("live\n")
            sys.stdout.flush()

    def take(self, events: Sequence[users_pb2.UserEvent], seen: int) -> None:
        """A message of a watcher that had `seen` events before."""
        self.messages += 1
        if self._skip is None:
            for event in events:
                self.positions += event.position
            return
        now = time.perf_counter()
        for number, event in enumerate(events, seen):
            late = now - int(event.user.username.removeprefix(DUE)) / 1e9
            if number >= self._skip:
                self.late.append(late)

    def told(self) -> dict[str, Any]:
        """As JSON has it; times are of `time.perf_counter`, which all processes of a machine share."""
        told = {
            "live": self.live,
            "last": time.perf_counter(),
            "processor": time.process_time() - self._processor,
            "messages": self.messages,
            "positions": self.positions,
        }
        if self.late:
            told |= {"events": len(self.late), "p50": percentile(self.late, 0.5), "p99": percentile(self.late, 0.99)}
        return told


async def feed(address: str, watchers: int, heard: Heard) -> None:
    """Streams that begin now."""

    async def follow(channel: grpc.aio.Channel) -> None:
        seen, waiting = 0, True
        async with aclosing(aiter(UserFeed(channel, start="now", progress=True))) as batches:
            async for batch in batches:
                if waiting and batch.caught_up:
                    waiting = False
                    heard.is_live()
                if batch.events:
                    heard.take(batch.events, seen)
                    seen += len(batch.events)
                    if seen >= heard.events:
                        return

    async with connect(address) as channel:
        await asyncio.gather(*(follow(channel) for _ in range(watchers)))


async def jetstream(address: str, watchers: int, heard: Heard) -> None:
    """Ordered consumers of what comes next."""
    import nats
    from nats.js.api import ConsumerConfig, DeliverPolicy

    client = await nats.connect(address)
    stream = client.jetstream()
    done = asyncio.Event()
    ended = 0

    async def follow() -> None:
        seen = 0

        async def take(message: Any) -> None:
            nonlocal seen, ended
            heard.take((users_pb2.UserEvent.FromString(message.data),), seen)
            seen += 1
            if seen == heard.events:
                ended += 1
                if ended == watchers:
                    done.set()

        await stream.subscribe(
            SUBJECT, cb=take, ordered_consumer=True, config=ConsumerConfig(deliver_policy=DeliverPolicy.NEW)
        )
        heard.is_live()

    for _ in range(watchers):
        await follow()
    await done.wait()
    await client.close()


async def parsed(address: str, watchers: int, heard: Heard) -> None:
    """Prepared messages, parsed."""

    async def follow(channel: grpc.aio.Channel) -> None:
        method = cast(
            "grpc.aio.UnaryStreamMultiCallable[bytes, users_pb2.WatchUsersResponse]",
            channel.unary_stream(_METHOD, None, _message),
        )
        seen = 0
        async for message in method(b""):
            if message.events:
                heard.take(message.events, seen)
                seen += len(message.events)
            else:
                heard.is_live()

    async with connect(address) as channel:
        await asyncio.gather(*(follow(channel) for _ in range(watchers)))


async def untouched(address: str, watchers: int, heard: Heard) -> None:
    """Prepared messages, as they come."""

    async def follow(channel: grpc.aio.Channel) -> None:
        method = cast("grpc.aio.UnaryStreamMultiCallable[bytes, bytes]", channel.unary_stream(_METHOD))
        async for message in method(b""):
            if message:
                heard.messages += 1
            else:
                heard.is_live()

    async with connect(address) as channel:
        await asyncio.gather(*(follow(channel) for _ in range(watchers)))


_WATCHERS: dict[str, Callable[[str, int, Heard], Coroutine[Any, Any, None]]] = {
    "feed": feed,
    "nats": jetstream,
    "parsed": parsed,
    "bytes": untouched,
}


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=_WATCHERS)
    parser.add_argument("--address", required=True)
    parser.add_argument("--watchers", type=int, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--timed", type=int)
    asked = parser.parse_args()
    heard = Heard(asked.watchers, asked.events, asked.timed)
    uvloop.run(_WATCHERS[asked.what](asked.address, asked.watchers, heard))
    print(json.dumps(heard.told()))


if __name__ == "__main__":
    main()
