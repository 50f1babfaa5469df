"""Several processes share the user feed: killed, paused, joining, leaving, and with other numbers of shards."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.harness import Database, Databases, ServiceProcess, Services, until
from tests.notifications.conftest import write
from tests.users.calls import create, stub_of
from tidings.client import Notifications, UserFeed, connect
from tidings.client.errors import BadTokenError
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2


class Crowd:
    """Users that are created and changed all the time."""

    def __init__(self, users: ServiceProcess) -> None:
        self._stub = stub_of(users)
        self.done = 0

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """While it goes on."""
        task = asyncio.create_task(self._go_on())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            task.result()

    async def _go_on(self) -> None:
        while True:
            made = await self._stub.CreateUser(create())
            for number in range(3):
                changed = users_pb2.User(id=made.id, display_name=f"Number {number}")
                await self._stub.UpdateUser(
                    users_pb2.UpdateUserRequest(user=changed, update_mask={"paths": ["display_name"]})
                )
            self.done += 4
            await asyncio.sleep(0.01)

    async def more(self, count: int = 40) -> None:
        """Waits until it has done so much more."""
        wanted = self.done + count
        await until(lambda: self.done >= wanted)

    async def head(self) -> int:
        """The newest position."""
        return (await self._stub.GetFeed(users_pb2.GetFeedRequest())).head_position


def rules_file(path: Path, name: str) -> Path:
    """Rules whose notifications have ids of their own: what is processed by two of them is seen twice."""
    text = f'[[rules]]\nname="{name}"\non=["CREATED", "UPDATED"]\ntemplate="welcome"\ncategory="c"\n'
    return write(path / f"{name}.toml", text + 'channels=["in_app"]\n')


async def state(process: ServiceProcess) -> notifications_pb2.Inbox:
    async with connect(process.address) as channel:
        return await Notifications(channel).inbox()


async def owners(process: ServiceProcess) -> list[int]:
    """The process ids of who has the shards, 0 where nobody has."""
    return [int(one.owner.rpartition("/")[2] or 0) for one in (await state(process)).shards]


async def is_shared(process: ServiceProcess, *among: ServiceProcess, shards: int) -> bool:
    """Whether all shards are followed, by these, and their numbers differ by one at most."""
    found = await owners(process)
    held = [found.count(one.pid) for one in among]
    return len(found) == sum(held) == shards and max(held) - min(held) <= 1


async def is_one(process: ServiceProcess) -> bool:
    """Whether the feed is undivided and somebody follows it."""
    found = await owners(process)
    return len(found) == 1 and found[0] > 0


async def once(database: Database, crowd: Crowd, process: ServiceProcess) -> None:
    """Every event has exactly one effect, in the order of each user."""
    head = await crowd.head()

    async def is_processed() -> bool:
        found = await state(process)
        return found.position == head and not any(one.lag_events for one in found.shards)

    await until(is_processed, 60, f"everything up to {head} is processed")
    [[made, events, users_in_order]] = await database.fetch(
        "SELECT count(*), count(DISTINCT event_id), bool_and(event_position > coalesce(before, 0)) FROM"
        " (SELECT *, lag(event_position) OVER (PARTITION BY user_id ORDER BY position) AS before FROM notifications) n"
    )
    assert (made, events, users_in_order) == (head, head, True)
    assert (await state(process)).notifications == head


@pytest.fixture
async def users(databases: Databases, services: Services) -> ServiceProcess:
    return await services.users(await databases.users()).start()


async def test_replicas_that_die_pause_join_and_leave(
    users: ServiceProcess, databases: Databases, services: Services, tmp_path: Path
) -> None:
    database = await databases.notifications()
    crowd = Crowd(users)
    settings = {"shards": 5, "shard_lease": 1, "feed_bookmark_interval": 1, "poll_interval": 0.2}
    made = [
        services.notifications(database, users, rules_file=rules_file(tmp_path, f"of{number}"), **settings)
        for number in range(3)
    ]
    await asyncio.gather(*(one.start() for one in made[:2]))
    async with crowd.busy():
        await until(lambda: is_shared(made[0], *made[:2], shards=5))
        # One joins.
        await made[2].start()
        await until(lambda: is_shared(made[0], *made, shards=5))
        await crowd.more()
        # One dies.
        before = {one.index: one.epoch for one in (await state(made[0])).shards}
        await made[1].kill()
        await until(lambda: is_shared(made[0], made[0], made[2], shards=5))
        assert all(before[one.index] <= one.epoch for one in (await state(made[0])).shards)
        await crowd.more()
        # One is paused, and finds others in its place when it wakes.
        held = [index for index, pid in enumerate(await owners(made[0])) if pid == made[2].pid]
        made[2].send(signal.SIGSTOP)
        await until(lambda: is_shared(made[0], made[0], shards=5))
        await crowd.more()
        epochs = {one.index: one.epoch for one in (await state(made[0])).shards}
        made[2].send(signal.SIGCONT)
        await until(lambda: is_shared(made[0], made[0], made[2], shards=5))
        assert any(one.epoch > epochs[one.index] for one in (await state(made[0])).shards)
        assert held
        await crowd.more()
        # One leaves: nobody waits for its lease to end.
        assert await made[0].stop() == 0
        await until(lambda: is_shared(made[2], made[2], shards=5))
        await crowd.more()
    await once(database, crowd, made[2])


async def test_the_number_of_shards_changes_while_events_come(
    users: ServiceProcess, databases: Databases, services: Services, tmp_path: Path
) -> None:
    database = await databases.notifications()
    crowd = Crowd(users)
    settings = {"shard_lease": 1, "feed_bookmark_interval": 1, "poll_interval": 0.2}

    def replica(name: str, shards: int) -> ServiceProcess:
        return services.notifications(database, users, rules_file=rules_file(tmp_path, name), shards=shards, **settings)

    async with crowd.busy():
        first, second = replica("one", 1), replica("two", 1)
        await asyncio.gather(first.start(), second.start())
        await until(lambda: is_one(first))
        await crowd.more()
        # A rollout: as long as an old replica lives, the number stays.
        third = await replica("three", 3).start()
        await third.wait_log("replicas want different numbers of shards: it stays as it is until they agree")
        assert await first.stop() == 0
        await crowd.more()
        assert len(await owners(third)) == 1
        await second.kill()
        await until(lambda: is_shared(third, third, shards=3))
        await crowd.more()

        # A release that knows no shards goes by this token, and is refused.
        [[token]] = await database.fetch("SELECT resume_token FROM inbox")
        async with connect(users.address) as channel:
            with pytest.raises(BadTokenError):
                await anext(aiter(UserFeed(channel, cursor=_Fixed(str(token)))))

        assert await third.stop() == 0
        fourth = await replica("four", 1).start()
        await until(lambda: is_shared(fourth, fourth, shards=1))
        await crowd.more()
    await once(database, crowd, fourth)
    assert await fourth.stop() == 0

    # One shard is followed as ever: that release can go on from the row of the inbox.
    [[token, position]] = await database.fetch("SELECT resume_token, position FROM inbox")
    await stub_of(users).CreateUser(create())
    async with connect(users.address) as channel:
        next_batch = await anext(aiter(UserFeed(channel, cursor=_Fixed(str(token)))))
    assert next_batch.previous_position == position
    assert len(next_batch.events) == 1


class _Fixed:
    """A cursor that is kept elsewhere."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def load(self) -> str | None:
        return self._token

    async def save(self, token: str) -> None:
        pass
