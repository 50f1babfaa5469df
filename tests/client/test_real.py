"""Snapshots, selections, expiry and cursors against a user service that is killed, and whose events are removed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.client.conftest import positions, take
from tests.harness import (
    Action,
    Database,
    Databases,
    Message,
    PostgresProxy,
    ServiceProcess,
    Services,
    is_commit,
    sql_contains,
    until,
)
from tidings.client import (
    ApiError,
    Batch,
    MemoryCursor,
    PositionExpiredError,
    Replica,
    User,
    UserFeed,
    Users,
    connect,
    leaves,
    shard_of,
)

_EXAMPLE = Path(__file__).parents[2] / "examples" / "keep_a_copy.py"
_TEAMS = ("red", "blue")


def _user(**fields: Any) -> User:
    name = f"u-{uuid.uuid4().hex[:12]}"
    return User(username=name, email=f"{name}@example.com", **fields)


async def _create(users: Users, count: int) -> list[str]:
    made = await users.create_batch(_user(labels={"team": _TEAMS[number % 2]}) for number in range(count))
    return [user.id for user in made]


async def _living(users: Users) -> dict[str, User]:
    return {user.id: user async for user in users.list()}


async def _change(users: Users, ids: list[str], chance: random.Random) -> None:
    """Makes a change at random; one that is not possible is none."""
    user_id = chance.choice(ids)
    try:
        match chance.randrange(5):
            case 0:
                ids.append((await users.create(_user(labels={"team": chance.choice(_TEAMS)}))).id)
            case 1:
                await users.delete(user_id)
            case 2:
                await users.undelete(user_id)
            case _:
                await users.update(User(id=user_id, labels={"team": chance.choice(_TEAMS)}), ["labels"])
    except ApiError as error:
        if error.code not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
            raise


@contextlib.asynccontextmanager
async def _writing(users: Users, ids: list[str], writers: int = 4) -> AsyncIterator[None]:
    """Changes go on inside."""
    writing = True

    async def write(seed: int) -> None:
        chance = random.Random(seed)
        while writing:
            await _change(users, ids, chance)

    async with asyncio.TaskGroup() as group:
        for seed in range(writers):
            group.create_task(write(seed))
        yield
        writing = False


async def _follow(
    feed: UserFeed, replica: Replica, is_over: Callable[[Batch], bool], batches: list[Batch]
) -> list[Batch]:
    """Applies batches, and notes them, until one is the last."""
    async with contextlib.aclosing(aiter(feed)) as followed:
        async for batch in followed:
            replica.apply(batch)
            batches.append(batch)
            if is_over(batch):
                break
    return batches


def _parts(batches: list[Batch]) -> list[str | None]:
    """The marks of snapshots."""
    return [batch.snapshot for batch in batches if batch.snapshot in ("begin", "end")]


_SELECTIONS: list[tuple[dict[str, Any], Callable[[User], bool]]] = [
    ({}, lambda _: True),
    ({"labels": {"team": "red"}}, lambda user: user.labels["team"] == "red"),
    ({"shard": (1, 3)}, lambda user: shard_of(user.id, 3) == 1),
    (
        {"labels": {"team": "blue"}, "shard": (0, 2)},
        lambda user: user.labels["team"] == "blue" and shard_of(user.id, 2) == 0,
    ),
]


async def test_copies_made_while_users_change_equal_the_table(real: ServiceProcess) -> None:
    async with connect(real.address) as channel:
        users = Users(channel)
        ids = await _create(users, 800)
        replicas = [Replica() for _ in _SELECTIONS]
        head: list[int] = []

        async def copy(number: int) -> list[Batch]:
            options = _SELECTIONS[number][0]
            feed = UserFeed(channel, start="snapshot", max_batch=30, progress=True, bookmark_interval=1, **options)
            return await _follow(feed, replicas[number], lambda batch: bool(head) and batch.position >= head[0], [])

        async with _writing(users, ids):
            copying = [asyncio.create_task(copy(number)) for number in range(len(replicas))]
            await until(lambda: all(replica.is_whole for replica in replicas), 60)
            goal = (await users.feed()).head_position + 300

            async def is_further() -> bool:
                return (await users.feed()).head_position >= goal

            await until(is_further, 60)
        head.append((await users.feed()).head_position)
        followed = await asyncio.gather(*copying)
        living = await _living(users)
    for replica, (_, is_selected), batches in zip(replicas, _SELECTIONS, followed, strict=True):
        assert replica.users == {user_id: user for user_id, user in living.items() if is_selected(user)}
        assert _parts(batches) == ["begin", "end"]
        assert any(batch.events and batch.snapshot is None for batch in batches)


@pytest.mark.parametrize("is_new", [False, True], ids=["the-same-feed", "another-feed-with-its-cursor"])
async def test_a_snapshot_goes_on_after_a_kill_in_its_middle(
    services: Services, users_database: Database, proxy: PostgresProxy, is_new: bool
) -> None:
    service = await services.users(proxy.url(users_database)).start()
    async with connect(service.address) as channel:
        users = Users(channel)
        ids = await _create(users, 700)
        # The page after the first is never read.
        fault = proxy.arm("*history*", Action.HOLD_BEFORE, sql_contains("users.id >"))
        replica, cursor = Replica(), MemoryCursor()
        options: dict[str, Any] = {"start": "snapshot", "max_batch": 50, "cursor": cursor, "progress": True}
        feed = UserFeed(channel, **options)
        batches: list[Batch] = []

        async def kill() -> None:
            await fault.happened()
            # What was read before is on its way.
            await until(lambda: len(replica.users) == 250)
            if following is not None:
                following.cancel()
            await service.kill()
            fault.release()
            await service.restart()
            # Newer than the snapshot: some in users that it has named, some in those it has not.
            for user_id in ids[::7]:
                await users.update(User(id=user_id, display_name="Zoë"), ["display_name"])

        following = asyncio.create_task(_follow(feed, replica, lambda _: False, batches)) if is_new else None
        killing = asyncio.create_task(kill())
        if is_new:
            await killing
            feed = UserFeed(channel, **options)
        await _follow(feed, replica, lambda batch: replica.is_whole and killing.done() and batch.caught_up, batches)
        head = (await users.feed()).head_position
        if batches[-1].position < head:
            await _follow(feed, replica, lambda batch: batch.position >= head, batches)
        assert replica.users == await _living(users)
    assert _parts(batches) == ["begin", "end"]
    named = [event.user.id for batch in batches if batch.snapshot == "within" for event in batch.events]
    assert sorted(named) == sorted(ids)
    assert set(positions([batch for batch in batches if batch.snapshot is None])) == set(range(701, head + 1))


async def test_a_place_that_retention_has_removed(services: Services, users_database: Database) -> None:
    quick = {"segment_events": 4, "seal_interval": 0.05, "retention_interval": 0.05, "events_kept": 0.2}
    service = await services.users(users_database, **quick).start()
    async with connect(service.address) as channel:
        users = Users(channel)
        cursor = MemoryCursor()
        [first] = await take(UserFeed(channel, cursor=cursor, start="now", progress=True), 1)
        old = cursor.token = first.resume_token
        await _create(users, 300)
        await users.delete((await _create(users, 1))[0])

        async def is_removed() -> bool:
            return (await users.feed()).earliest_position == 303

        await until(is_removed)
        with pytest.raises(PositionExpiredError) as caught:
            await take(UserFeed(channel, cursor=cursor), 1)
        assert caught.value.earliest_position == 303
        assert cursor.token == old

        replica = Replica()
        feed = UserFeed(channel, cursor=cursor, snapshot_on=PositionExpiredError, progress=True)
        batches = await _follow(feed, replica, lambda batch: batch.caught_up, [])
        assert _parts(batches) == ["begin", "end"]
        assert replica.users == await _living(users)
        assert len(replica.users) == 300
        # The cursor holds what follows the snapshot. It is followed already when that comes, for it is soon removed.
        async with contextlib.aclosing(aiter(UserFeed(channel, cursor=cursor, progress=True))) as going_on:
            assert not (await anext(going_on)).events
            late = await users.create(_user())
            while not (batch := await anext(going_on)).events:
                pass
        assert [event.user for event in batch.events] == [late]


async def test_who_leaves_a_filter_and_comes_back(real: ServiceProcess) -> None:
    async with connect(real.address) as channel:
        users = Users(channel)
        label = {"room": uuid.uuid4().hex}
        [start] = await take(UserFeed(channel, start="now", progress=True, labels=label), 1)
        user = await users.create(_user(labels=label))
        for labels in ({"room": "other"}, {"room": "third"}, label):
            await users.update(User(id=user.id, labels=labels), ["labels"])
        await users.delete(user.id)
        cursor = MemoryCursor(start.resume_token)
        seen = []
        async with contextlib.aclosing(aiter(UserFeed(channel, cursor=cursor, labels=label))) as batches:
            async for batch in batches:
                seen += [(event.user.version, event.left_filter, leaves(event)) for event in batch.events]
                if len(seen) == 4:
                    break
    # In the third change it was in another room before and after.
    assert seen == [(1, False, False), (2, True, True), (4, False, False), (5, False, True)]


class TestTheCallersTransaction:
    """examples/keep_a_copy.py, killed again and again."""

    async def test_each_event_has_one_effect(self, real: ServiceProcess, databases: Databases) -> None:
        mine, chance = await databases.blank("notifications"), random.Random()
        async with connect(real.address) as channel:
            users = Users(channel)
            ids = [user_id for _ in range(3) for user_id in await _create(users, 1000)]
            snapshot = (await users.feed()).head_position
            kills = 0
            while not (kills and await self._is(mine, "SELECT count(*) > 0 FROM place WHERE snapshot > 0")):
                await self._run_and_kill(real, mine, chance.uniform(0, 0.1))
                kills += 1
            async with self._running(real, mine):
                await until(lambda: self._is(mine, f"SELECT count(*) >= {len(ids)} FROM copied_users"))
                await users.create(_user())
                await until(lambda: self._is(mine, "SELECT count(*) = 1 FROM changes"))
            # Two at once, of which only one moves the place at a time.
            async with _writing(users, ids), asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(self._run_and_kill_often(real, mine, 4))
            head = (await users.feed()).head_position
            async with self._running(real, mine):
                await until(lambda: self._is(mine, f"SELECT max(position) = {head} FROM changes"))
            living = await _living(users)
        changed = [position for (position,) in await mine.fetch("SELECT position FROM changes ORDER BY position")]
        assert changed == list(range(snapshot + 1, head + 1))
        copied = await mine.fetch("SELECT id::text, version, username, email, labels FROM copied_users")
        assert sorted(copied) == sorted(
            (user.id, user.version, user.username, user.email, dict(user.labels)) for user in living.values()
        )

    @pytest.mark.parametrize("action", [Action.HOLD_BEFORE, Action.HOLD_AFTER], ids=["before", "after"])
    @pytest.mark.parametrize(
        "when",
        [sql_contains("UPDATE place"), sql_contains("INSERT INTO changes"), is_commit],
        ids=["move", "apply", "commit"],
    )
    async def test_killed_at_a_statement_that_arrives_when_its_successor_works(
        self,
        real: ServiceProcess,
        databases: Databases,
        proxy: PostgresProxy,
        when: Callable[[Message], bool],
        action: Action,
    ) -> None:
        mine = await databases.blank("notifications")
        has_changes = "SELECT count(*) > 0 FROM changes"
        waits = (
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with connect(real.address) as channel:
            users = Users(channel)
            async with self._running(real, mine, proxy.url(mine)):
                await until(lambda: self._place(mine))
                await until(lambda: self._is(mine, "SELECT token IS NOT NULL FROM place"))
                await users.create(_user())
                await until(lambda: self._is(mine, has_changes))
                fault = proxy.arm("*", action, when)
                await users.create(_user())
                await fault.happened()
            async with self._running(real, mine):

                async def is_held_up_or_through() -> bool:
                    return await self._is(mine, waits) or await self._is(mine, "SELECT count(*) > 1 FROM changes")

                await until(is_held_up_or_through)
                fault.release()
                head = (await users.feed()).head_position
                await until(lambda: self._is(mine, f"SELECT max(position) = {head} FROM changes"))
        changed = [position for (position,) in await mine.fetch("SELECT position FROM changes ORDER BY position")]
        assert changed == [head - 1, head]

    async def _run_and_kill_often(self, real: ServiceProcess, mine: Database, times: int) -> None:
        for _ in range(times):
            await self._run_and_kill(real, mine, random.uniform(0, 0.4))

    async def _run_and_kill(self, real: ServiceProcess, mine: Database, after: float) -> None:
        """Kills it some seconds after it has moved its place."""
        before = await self._place(mine)
        async with self._running(real, mine):

            async def has_moved() -> bool:
                return await self._place(mine) != before

            await until(has_moved, poll=0.005)
            await asyncio.sleep(after)

    @contextlib.asynccontextmanager
    async def _running(self, real: ServiceProcess, mine: Database, url: str = "") -> AsyncIterator[None]:
        """The example runs inside, and is killed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(_EXAMPLE), "--users", real.address, "--database", url or mine.url,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield
        finally:
            if process.returncode is None:
                process.kill()
            output, _ = await process.communicate()
        assert (process.returncode, output) == (-9, b"")

    async def _is(self, mine: Database, query: str) -> bool:
        return await mine.fetch(query) == [(True,)]

    async def _place(self, mine: Database) -> object:
        [[exists]] = await mine.fetch("SELECT to_regclass('place') IS NOT NULL")
        return await mine.fetch("SELECT token FROM place") if exists else []
