"""One ImportUsers stream as a process of its own: prints "live" at the first answer and one JSON object at its end.

python -m bench.importer --address A --users 100000
python -m bench.importer --address A --seconds 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import uvloop

from bench.load import CONFLICTS, channels, request
from tidings.users.v1 import users_pb2, users_pb2_grpc

_MESSAGE = 500


def _messages(chance: random.Random) -> Iterator[users_pb2.ImportUsersRequest]:
    last = ""
    while True:
        message = users_pb2.ImportUsersRequest()
        for _ in range(_MESSAGE):
            one = request(chance, last if last and chance.random() < CONFLICTS else "")
            message.users.add(user=one.user, request_id=one.request_id)
            last = one.user.username
        yield message


def _until(end: float, messages: Iterable[users_pb2.ImportUsersRequest]) -> Iterator[users_pb2.ImportUsersRequest]:
    for message in messages:
        if time.perf_counter() > end:
            return
        yield message


async def run(address: str, users: int, seconds: float) -> dict[str, Any]:
    """So many users, made before the clock starts: what is measured is the service. Or as many as so many seconds
    take.
    """
    made = _messages(random.Random())
    given: Iterable[users_pb2.ImportUsersRequest] = [next(made) for _ in range(users // _MESSAGE)]
    begun = time.perf_counter()
    if seconds:
        given = _until(begun + seconds, made)
    call = users_pb2_grpc.UserServiceStub(channels(address)[0]).ImportUsers()
    sent = 0

    async def send() -> None:
        nonlocal sent
        for message in given:
            sent += len(message.users)
            await call.write(message)
        await call.done_writing()

    sending = asyncio.create_task(send())
    answer = users_pb2.ImportUsersResponse()
    failed = 0
    async for answer in call:
        if not failed:
            print("live", flush=True)
        failed += len(answer.failed)
    took = time.perf_counter() - begun
    await sending
    if (answer.processed, answer.created + failed) != (sent, sent):
        raise RuntimeError(f"{answer.created} created and {failed} failed of {sent}")
    return {"per_second": sent / took, "users": sent}


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=0)
    asked = parser.parse_args()
    print(json.dumps(uvloop.run(run(asked.address, asked.users, asked.seconds))))


if __name__ == "__main__":
    main()
