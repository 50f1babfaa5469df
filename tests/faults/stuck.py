"""Subscribers that stop reading, while nobody else is disturbed: do they cost memory, do they delay others?

Many streams of one replica are opened and not read. Then large users are created, many times what a stream may hold.
Streams that do read, on the same replica, must get all of it while the others are stuck; memory is looked at before and
after. No clock decides: others count as delayed if they stand still until the stuck streams are let go.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
import uuid
from pathlib import Path
from typing import Any

import grpc.aio

from tests.faults.asking import OPTIONS, Asked, Asker
from tests.faults.following import Habit, request_of, watch
from tests.faults.journal import Journal
from tests.faults.site import Site
from tests.proof.records import Intent, Stuck
from tidings.users.v1 import users_pb2

_STREAMS = 16
_WITNESSES = 2
_BATCHES, _BATCH = 6, 250
_LABELS = {f"large-{n}": "v" * 250 for n in range(30)}  # 8 kB
# What a stuck stream may cost: a message under 1 MiB as made, and as gRPC holds it.
_PER_STREAM = 3 << 20
# The window, the cache of messages, and requests of 2 MB being decoded and encoded.
_OTHERWISE = 48 << 20
# How long others may stand still. Generous: the machine may be busy, and the storm is over.
_PATIENCE = 15.0


class _Witness:
    """A subscriber that reads, and goes on when its stream has become old."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._token = ""
        self.begun = asyncio.Event()
        self.received = 0

    async def run(self) -> None:
        """Reads until cancelled."""
        habit = Habit("witness", "now")
        while True:
            call = watch(self._channel, request_of(habit, "token" if self._token else "now", self._token, 0))
            try:
                async for data in call:
                    message = users_pb2.WatchUsersResponse.FromString(data)
                    self.received += len(message.events)
                    self._token = message.resume_token or self._token
                    self.begun.set()
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)
            finally:
                call.cancel()


async def trial(site: Site, chance: random.Random, path: Path) -> None:
    """One trial, on one replica. The record goes to the site's journal, the changes to `path`."""
    replica = chance.choice(site.replicas)
    address = replica.process.address
    journal = Journal(path)
    # Channels of their own: streams of one connection share its window.
    channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(_STREAMS + _WITNESSES)]
    others = [other.process.address for other in site.replicas if other is not replica] or [address]
    asker = Asker(others, journal)
    unread: list[Any] = []
    witnesses: list[_Witness] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        for channel in channels[:_STREAMS]:
            unread.append(watch(channel, request_of(Habit("stuck", "now"), "now", "", 0)))
            await unread[-1].read()
        for channel in channels[_STREAMS:]:
            witnesses.append(_Witness(channel))
            tasks.append(asyncio.create_task(witnesses[-1].run()))
            await witnesses[-1].begun.wait()
        gc.collect()
        before = replica.memory
        name = uuid.UUID(int=chance.getrandbits(128)).hex[:8]
        for number in range(_BATCHES):
            await asker.settle(_batch(f"s{name}-{number}", chance), chance)
        received = await _stand_still(witnesses)
        record = Stuck(
            replica.number, _STREAMS, _BATCHES * _BATCH, _WITNESSES, received,
            replica.memory - before, _STREAMS * _PER_STREAM + _OTHERWISE,
        )  # fmt: skip
        site.journal.note(record)
    finally:
        for one in (*unread, *tasks):
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()
        await asker.close()
        journal.close()


def _batch(op: str, chance: random.Random) -> Asked:
    tags = [f"{op}.{index}" for index in range(_BATCH)]
    requests = [
        users_pb2.CreateUserRequest(
            user={"username": f"u{tag}", "email": f"u{tag}@example.com", "display_name": tag, "labels": _LABELS},
            request_id=str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        )
        for tag in tags
    ]
    intent = Intent(op, "BatchCreateUsers", time.monotonic(), tags, "")
    return Asked(intent, users_pb2.BatchCreateUsersRequest(requests=requests))


async def _stand_still(witnesses: list[_Witness]) -> int:
    """What the witnesses have received together when they have all of it, or have stood still for long."""
    wanted = _BATCHES * _BATCH * len(witnesses)
    last, since = -1, time.monotonic()
    while (received := sum(min(one.received, _BATCHES * _BATCH) for one in witnesses)) < wanted:
        if received > last:
            last, since = received, time.monotonic()
        if time.monotonic() > since + _PATIENCE:
            break
        await asyncio.sleep(0.05)
    return received
