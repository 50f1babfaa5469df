"""What callers do, as a process of its own that prints one JSON object at its end.

python -m bench.load create --addresses A,B --callers 64 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import uuid
from typing import Any

import grpc
import grpc.aio
import uvloop

from bench.measure import percentile
from tidings.users.v1 import users_pb2, users_pb2_grpc

CONFLICTS = 0.01


def request(chance: random.Random, username: str = "") -> users_pb2.CreateUserRequest:
    """A new user's, or one with that username."""
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


def channels(addresses: str) -> list[grpc.aio.Channel]:
    """One for each address, apart from each other."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return [grpc.aio.insecure_channel(address, options=options) for address in addresses.split(",")]


async def create(addresses: str, callers: int, seconds: float) -> dict[str, Any]:
    """Callers that create one user after the other; one in a hundred asks for a name that is taken."""
    opened = channels(addresses)
    made = conflicts = 0
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def call(number: int) -> None:
        nonlocal made, conflicts
        stub = users_pb2_grpc.UserServiceStub(opened[number % len(opened)])
        chance = random.Random()
        last = ""
        while (begun := time.perf_counter()) < end:
            one = request(chance, last if last and chance.random() < CONFLICTS else "")
            try:
                await stub.CreateUser(one)
                made += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
                conflicts += 1
            last = one.user.username
            times.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(callers)))
    took = time.perf_counter() - begun
    return {
        "per_second": (made + conflicts) / took,
        "made": made,
        "conflicts": conflicts,
        "p50": percentile(times, 0.50),
        "p99": percentile(times, 0.99),
    }


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["create"])
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    asked = parser.parse_args()
    running = create(asked.addresses, asked.callers, asked.seconds)
    print(json.dumps(uvloop.run(running)))


if __name__ == "__main__":
    main()
