"""Many streams, or odd ones, as a process of its own that prints one JSON object at its end.

python -m bench.subscribers resume --address A --streams 1000
python -m bench.subscribers live --address A --streams 1000
python -m bench.subscribers stall --address A --streams 10
python -m bench.subscribers leave --address A --streams 200
python -m bench.subscribers probe --address A --rate 50

`resume` reads from the earliest event until every stream has caught up, without decoding events: the server is what is
measured. `live` streams hear of what happens; `stall` opens streams and never reads on; `leave` cancels each stream
after a random while and opens another; `probe` creates users at an even rate. All but `resume` go on until SIGTERM. All
print `open` once they are at work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio
import uvloop

from bench.measure import percentile
from tidings.users.v1 import users_pb2, users_pb2_grpc

# Streams that share a connection.
_PER_CONNECTION = 50
# No message of events is as short, and no mark as long.
_MARK_BYTES = 250

_Measured = dict[str, float]


def _channels(address: str, streams: int) -> list[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return [grpc.aio.insecure_channel(address, options=options) for _ in range(-(-streams // _PER_CONNECTION))]


def _watch(channel: grpc.aio.Channel) -> Any:
    """The method, answering with bytes."""
    return channel.unary_stream(
        "/tidings.users.v1.UserService/WatchUsers",
        request_serializer=users_pb2.WatchUsersRequest.SerializeToString,
    )


def _say_open() -> None:
    print("open", flush=True)


def _ended() -> asyncio.Event:
    """Set by SIGTERM."""
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, event.set)
    return event


async def resume(address: str, streams: int, rate: float) -> _Measured:
    """Streams that begin together far behind."""
    received = opened = 0
    channels = _channels(address, streams)
    await asyncio.gather(*(channel.channel_ready() for channel in channels))

    async def follow(number: int) -> None:
        nonlocal received, opened
        call = _watch(channels[number % len(channels)])(users_pb2.WatchUsersRequest(earliest={}))
        first = True
        async for data in call:
            if first:
                first = False
                opened += 1
                if opened == streams:
                    _say_open()
            received += len(data)
            if len(data) < _MARK_BYTES and users_pb2.WatchUsersResponse.FromString(data).HasField("caught_up"):
                call.cancel()
                return

    begun = time.perf_counter()
    await asyncio.gather(*(follow(number) for number in range(streams)))
    return {"seconds": time.perf_counter() - begun, "bytes": received}


async def live(address: str, streams: int, rate: float) -> _Measured:
    """Streams that hear of what happens."""
    received = opened = 0
    channels = _channels(address, streams)
    ended = _ended()

    async def follow(number: int) -> None:
        nonlocal received, opened
        async for data in _watch(channels[number % len(channels)])(users_pb2.WatchUsersRequest(now={})):
            received += len(data)
            if len(data) < _MARK_BYTES and users_pb2.WatchUsersResponse.FromString(data).HasField("caught_up"):
                opened += 1
                if opened == streams:
                    _say_open()

    following = [asyncio.create_task(follow(number)) for number in range(streams)]
    await ended.wait()
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    return {"bytes": received}


async def stall(address: str, streams: int, rate: float) -> _Measured:
    """Streams that are opened and not read."""
    channels = _channels(address, streams)
    calls = [
        _watch(channels[number % len(channels)])(users_pb2.WatchUsersRequest(earliest={})) for number in range(streams)
    ]
    await asyncio.gather(*(call.read() for call in calls))
    ended = _ended()
    _say_open()
    await ended.wait()
    return {"streams": streams}


async def leave(address: str, streams: int, rate: float) -> _Measured:
    """Streams that are cancelled at random, at their beginning, in the middle of old events, or live."""
    channels = _channels(address, streams)
    ended, made = _ended(), 0

    async def come_and_go(number: int) -> None:
        nonlocal made
        chance = random.Random(number)
        while not ended.is_set():
            live = chance.random() < 0.5
            request = users_pb2.WatchUsersRequest(now={}) if live else users_pb2.WatchUsersRequest(earliest={})
            call = _watch(channels[number % len(channels)])(request)
            made += 1
            for _ in range(chance.randint(0, 5)):
                if ended.is_set() or await call.read() is grpc.aio.EOF:
                    break
            call.cancel()

    work = [asyncio.create_task(come_and_go(number)) for number in range(streams)]
    _say_open()
    await ended.wait()
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    return {"made": made}


async def probe(address: str, streams: int, rate: float) -> _Measured:
    """Creations at even times, whatever each takes; seconds from when each was due."""
    [channel] = _channels(address, 1)
    stub = users_pb2_grpc.UserServiceStub(channel)
    times: list[float] = []
    ended = _ended()

    async def create(due: float) -> None:
        name = uuid.uuid4().hex
        user = users_pb2.User(username=name, email=f"{name}@example.com", display_name=name)
        await stub.CreateUser(users_pb2.CreateUserRequest(user=user, request_id=str(uuid.uuid4())))
        times.append(time.perf_counter() - due)

    calls: set[asyncio.Task[None]] = set()
    begun, number = time.perf_counter(), 0
    while not ended.is_set():
        due = begun + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        call = asyncio.create_task(create(due))
        calls.add(call)
        call.add_done_callback(calls.discard)
        number += 1
        if number == 1:
            _say_open()
    await asyncio.gather(*calls)
    return {"made": len(times), "p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}


_WORK: dict[str, Callable[[str, int, float], Coroutine[Any, Any, _Measured]]] = {
    work.__name__: work for work in (resume, live, stall, leave, probe)
}


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(_WORK))
    parser.add_argument("--address", required=True)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--rate", type=float, default=50)
    asked = parser.parse_args()
    print(json.dumps(uvloop.run(_WORK[asked.what](asked.address, asked.streams, asked.rate))), flush=True)


if __name__ == "__main__":
    main()
