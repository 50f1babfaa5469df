"""One ImportUsers stream as a process of its own that prints one JSON object at its end.

python -m bench.importer import --addresses A --users 100000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

import uvloop

from bench.load import _channels, _request
from tidings.users.v1 import users_pb2, users_pb2_grpc

_MESSAGE = 500
_CONFLICTS = 0.01


def _messages(users: int) -> list[users_pb2.ImportUsersRequest]:
    chance = random.Random()
    messages = []
    last = ""
    for first in range(0, users, _MESSAGE):
        message = users_pb2.ImportUsersRequest()
        for _ in range(min(_MESSAGE, users - first)):
            request = _request(chance, last if last and chance.random() < _CONFLICTS else "")
            message.users.add(user=request.user, request_id=request.request_id)
            last = request.user.username
        messages.append(message)
    return messages


async def run(addresses: str, users: int) -> dict[str, Any]:
    """Users made beforehand: what is measured is the service, not the making of its load."""
    stub = users_pb2_grpc.UserServiceStub(_channels(addresses)[0])
    messages = _messages(users)
    call = stub.ImportUsers()

    async def send() -> None:
        for message in messages:
            await call.write(message)
        await call.done_writing()

    begun = time.perf_counter()
    sending = asyncio.create_task(send())
    processed = created = failed = 0
    async for answer in call:
        processed, created = answer.processed, answer.created
        failed += len(answer.failed)
    took = time.perf_counter() - begun
    await sending
    if processed != users or created + failed != users:
        raise RuntimeError(f"{created} created and {failed} failed of {users}")
    return {"per_second": users / took, "created": created, "failed": failed}


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["import"])
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--users", type=int, default=100_000)
    asked = parser.parse_args()
    print(json.dumps(uvloop.run(run(asked.addresses, asked.users))))


if __name__ == "__main__":
    main()
