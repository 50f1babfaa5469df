"""Sends at an even rate in a process of its own, whatever each call takes, and prints one JSON object at its end.

python -m bench.sending feed --address A --rate 200 --events 2200
python -m bench.sending nats --address A --rate 200 --events 2200

A call is made when it is due, though those before it may not have been answered: arrivals do not wait for the server.
When it was due is in the username, so that a watcher knows how late it hears of it, however late the call itself was.
`feed` calls CreateUser. `nats` publishes a UserEvent of the same user and waits for the acknowledgement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import nats
import uvloop
from uuid_utils import uuid7

from bench import filling
from bench.reading import SUBJECT
from bench.watching import DUE
from tidings.client import connect
from tidings.users.v1 import users_pb2, users_pb2_grpc
from user_service.validation import CALLER_FIELDS


def _user(when: float) -> users_pb2.User:
    user = filling.user(0)
    user.username = f"{DUE}{int(when * 1e9)}"
    user.email = f"{user.username}@example.com"
    return user


async def _evenly(send: Callable[[users_pb2.User], Awaitable[Any]], rate: float, events: int) -> dict[str, Any]:
    """Sends; says how late sending itself was."""
    sent: list[asyncio.Future[Any]] = []
    late = 0.0
    begun = time.perf_counter() + 0.1
    for number in range(events):
        when = begun + number / rate
        while (left := when - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        sent.append(asyncio.ensure_future(send(_user(when))))
        late = max(late, time.perf_counter() - when)
    await asyncio.gather(*sent)
    return {"latest": late}


async def feed(address: str, rate: float, events: int) -> dict[str, Any]:
    """Creates users."""
    async with connect(address) as channel:
        stub = users_pb2_grpc.UserServiceStub(channel)
        await stub.GetFeed(users_pb2.GetFeedRequest())
        return await _evenly(
            lambda user: stub.CreateUser(users_pb2.CreateUserRequest(user=user, request_id=str(uuid.uuid4()))),
            rate,
            events,
        )


async def jetstream(address: str, rate: float, events: int) -> dict[str, Any]:
    """Publishes."""
    client = await nats.connect(address)
    stream = client.jetstream()

    def publish(user: users_pb2.User) -> Awaitable[Any]:
        user.id, user.version = str(uuid7()), 1
        user.create_time.GetCurrentTime()
        user.update_time.CopyFrom(user.create_time)
        event = users_pb2.UserEvent(
            position=1 << 20,
            id=str(uuid7()),
            type=users_pb2.UserEvent.CREATED,
            user=user,
            changed_fields=CALLER_FIELDS,
            commit_time=user.create_time,
        )
        return stream.publish(SUBJECT, event.SerializeToString())

    measured = await _evenly(publish, rate, events)
    await client.close()
    return measured


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["feed", "nats"])
    parser.add_argument("--address", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--events", type=int, required=True)
    asked = parser.parse_args()
    send = feed if asked.what == "feed" else jetstream
    print(json.dumps(uvloop.run(send(asked.address, asked.rate, asked.events))))


if __name__ == "__main__":
    main()
