"""Replicas of the user service are restarted one after the other while people call and subscribers follow.

Clients take turns among the replicas by themselves, as behind a headless Service. A replica ends by SIGTERM,
as the kubelet ends it, and comes back at its address before the next one goes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from tests.harness import Database, ServiceProcess, Services, until
from tests.users.calls import user
from tidings.client import MemoryCursor, UserFeed, Users, connect
from tidings.users.v1 import users_pb2

_REPLICAS, _CALLERS, _SUBSCRIBERS = 3, 12, 3
# Calls that are answered before the first replica goes and after each restart.
_BETWEEN = 60


@dataclass
class Load:
    """What callers asked for and were told."""

    created: dict[str, users_pb2.User] = field(default_factory=dict)
    # Of users: how many of their changes were acknowledged.
    changes: Counter[str] = field(default_factory=Counter)
    failed: list[Exception] = field(default_factory=list)
    calls: int = 0
    stopping: bool = False

    async def call(self, users: Users) -> None:
        """A user's life, again and again: mutations, and reads of what they made."""
        while not self.stopping:
            try:
                made = await users.create(user())
                self.created[made.id] = made
                self.changes[made.id] += 1
                assert (await users.get(made.id)).version == 1
                changed = await users.update(users_pb2.User(id=made.id, display_name="Zoë"), ["display_name"])
                self.changes[made.id] += 1
                assert changed.version == 2
                await users.feed()
                if self.calls % 3 == 0:
                    await users.delete(made.id)
                    self.changes[made.id] += 1
            except Exception as error:
                self.failed.append(error)
            self.calls += 1

    async def go_on(self, calls: int) -> None:
        """Waits until so many more lives have been led."""
        enough = self.calls + calls
        await until(lambda: self.calls >= enough, 60, f"{calls} more calls")


@dataclass
class Subscriber:
    """What one subscriber was told."""

    events: list[users_pb2.UserEvent] = field(default_factory=list)

    async def follow(self, feed: UserFeed) -> None:
        """Until it is cancelled."""
        async with aclosing(aiter(feed)) as batches:
            async for batch in batches:
                self.events += batch.events


async def _restart(replica: ServiceProcess) -> None:
    assert await replica.stop() == 0
    await replica.restart()


@pytest.mark.timeout(240)
async def test_a_rolling_restart_fails_no_call_and_loses_and_doubles_no_event(
    services: Services, users_database: Database
) -> None:
    replicas = [
        await services.users(users_database, drain_time=1, reconnect_spread=0.5, max_stream_age=5).start()
        for _ in range(_REPLICAS)
    ]
    addresses = "ipv4:" + ",".join(replica.address for replica in replicas)
    load, subscribers = Load(), [Subscriber() for _ in range(_SUBSCRIBERS)]
    async with connect(addresses) as channel, connect(addresses) as followed:
        users = Users(channel, timeout=30)
        async with asyncio.TaskGroup() as running:
            following = [
                running.create_task(one.follow(UserFeed(followed, cursor=MemoryCursor()))) for one in subscribers
            ]
            callers = [running.create_task(load.call(users)) for _ in range(_CALLERS)]
            await load.go_on(_BETWEEN)
            for replica in replicas:
                await _restart(replica)
                await load.go_on(_BETWEEN)
            load.stopping = True
            await asyncio.gather(*callers)
            head = (await users.feed()).head_position
            await until(lambda: all(one.events and one.events[-1].position >= head for one in subscribers), 60)
            for task in following:
                task.cancel()

    assert load.failed == []
    assert head == sum(load.changes.values())
    for one in subscribers:
        assert [event.position for event in one.events] == list(range(1, head + 1))
        assert Counter(event.user.id for event in one.events) == load.changes
        assert len({event.id for event in one.events}) == head
    # All of them have served, also after they came back.
    assert all(len(replica.events("serving")) == 2 for replica in replicas)
    firsts = itertools.groupby(subscribers[0].events, key=lambda event: event.user.id)
    assert {user_id for user_id, _ in firsts} == set(load.created)
