"""What callers and subscribers do, as a process of its own that prints one JSON object at its end.

python -m bench.load create --addresses A,B --callers 64 --seconds 5
python -m bench.load write --addresses A --rate 200 --seconds 10
python -m bench.load watch --addresses A --watchers 100 --seconds 12
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import uuid
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.measure import percentile
from tidings.users.v1 import users_pb2, users_pb2_grpc

_CONFLICTS = 0.01


def _request(chance: random.Random, username: str = "") -> users_pb2.CreateUserRequest:
    name = username or f"user-{chance.getrandbits(60):015x}"
    user = users_pb2.User(
        username=name,
        email=f"{name}@example.com",
        display_name="Αθηνά Παπαδοπούλου",
        locale="el-GR",
        time_zone="Europe/Athens",
        labels={"team": "red"},
    )
    return users_pb2.CreateUserRequest(user=user, request_id=str(uuid.UUID(int=chance.getrandbits(128), version=4)))


def _channels(addresses: str) -> list[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return [grpc.aio.insecure_channel(address, options=options) for address in addresses.split(",")]


async def create(addresses: str, callers: int, seconds: float) -> dict[str, Any]:
    """Callers that create one user after the other; one in a hundred asks for a name that is taken."""
    channels = _channels(addresses)
    made = conflicts = 0
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def call(number: int) -> None:
        nonlocal made, conflicts
        stub = users_pb2_grpc.UserServiceStub(channels[number % len(channels)])
        chance = random.Random()
        last = ""
        while (begun := time.perf_counter()) < end:
            request = _request(chance, last if last and chance.random() < _CONFLICTS else "")
            try:
                await stub.CreateUser(request)
                made += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
                conflicts += 1
            last = request.user.username
            times.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(callers)))
    took = time.perf_counter() - begun
    return {
        "per_second": (made + conflicts) / took,
        "made": made,
        "conflicts": conflicts,
        "p99": percentile(times, 0.99),
    }


async def write(addresses: str, rate: float, seconds: float) -> dict[str, Any]:
    """An even stream of creations, whatever each takes."""
    stub = users_pb2_grpc.UserServiceStub(_channels(addresses)[0])
    chance = random.Random()
    calls = []
    begun = time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        calls.append(asyncio.ensure_future(stub.CreateUser(_request(chance))))
    await asyncio.gather(*calls)
    return {"made": len(calls)}


async def watch(addresses: str, watchers: int, seconds: float) -> dict[str, Any]:
    """Live subscribers: seconds from each event's commit time, which is taken before COMMIT, to its being decoded."""
    channels = _channels(addresses)
    late: list[float] = []
    live = 0

    async def follow(number: int) -> None:
        nonlocal live
        stub = users_pb2_grpc.UserServiceStub(channels[number % len(channels)])
        async for message in stub.WatchUsers(users_pb2.WatchUsersRequest(now={})):
            if message.HasField("caught_up"):
                live += 1
                if live == watchers:
                    sys.stdout.write("live\n")
                    sys.stdout.flush()
            now = time.time()
            late.extend(now - event.commit_time.ToNanoseconds() / 1e9 for event in message.events)

    tasks = [asyncio.create_task(follow(number)) for number in range(watchers)]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"events": len(late), "p50": percentile(late, 0.50), "p99": percentile(late, 0.99)}


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["create", "write", "watch"])
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--watchers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    asked = parser.parse_args()
    if asked.what == "create":
        running = create(asked.addresses, asked.callers, asked.seconds)
    elif asked.what == "write":
        running = write(asked.addresses, asked.rate, asked.seconds)
    else:
        running = watch(asked.addresses, asked.watchers, asked.seconds)
    print(json.dumps(uvloop.run(running)))


if __name__ == "__main__":
    main()
