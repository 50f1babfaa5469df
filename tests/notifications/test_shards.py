"""Replicas share the user feed: leases, fences, and a number of shards that changes, against a real Postgres."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notification_service import lanes, rules, shards
from notification_service.compose import Composer
from notification_service.domain import Cursor, Hold
from notification_service.follower import Follower, Source
from notification_service.inbox import HoldLostError, Inbox
from notification_service.store import feed as rows
from notification_service.store import shards as leases
from notification_service.store import standing
from notification_service.store.shards import Division, Replica, Shard
from notification_service.templates import Templates
from servicekit import database
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, Events, batch, eventually, write
from tidings.client import Batch, CursorStore, shard_of
from tidings.client.feed import Start
from tidings.users.v1 import users_pb2

LOG_ID = uuid.uuid4()


def division(of: int, owners: Sequence[uuid.UUID | None], wanted: Sequence[int], divided: bool = True) -> Division:
    made = tuple(Shard(number, of, 1, owner) for number, owner in enumerate(owners))
    return Division(made, tuple(Replica(uuid.UUID(int=one), number) for one, number in enumerate(wanted)), divided)


A, B, C = (uuid.UUID(int=number) for number in range(3))


def numbers(some: Sequence[Shard]) -> list[int]:
    return [one.shard for one in some]


def test_a_replica_takes_its_share_and_gives_up_what_is_above_it() -> None:
    seen = division(4, [A, A, A, None], [4, 4, 4])
    assert numbers(shards.plan(seen, A).give_up) == [2]
    assert numbers(shards.plan(seen, A).mine) == [0, 1]
    assert numbers(shards.plan(seen, B).take) == [3]
    # Who joined last has what remains.
    assert numbers(shards.plan(division(4, [A, A, None, None], [4, 4, 4]), C).take) == [2]
    assert shards.plan(division(1, [A], [1, 1], divided=False), B) == shards.Plan(0)


@pytest.mark.parametrize(
    ("seen", "to"),
    [
        (division(0, [], [3], divided=False), 3),
        (division(0, [], [3, 2], divided=False), 3),
        (division(2, [A, B], [2, 2]), 0),
        # A rollout: once the last that wants it otherwise is gone.
        (division(2, [A, B], [2, 3]), 0),
        (division(2, [A, B], [3, 3]), 3),
        # The whole feed was set to a place: each shard goes on from there.
        (division(2, [A, B], [2, 2], divided=False), 2),
        (division(2, [A, B], [2, 3], divided=False), 2),
    ],
)
def test_the_feed_is_divided_as_all_replicas_want_it(seen: Division, to: int) -> None:
    assert shards.plan(seen, A).divide == to
    assert shards.plan(seen, B).divide == 0 if len(seen.replicas) > 1 else True
    if not seen.divided and len(seen.shards) > 1:
        assert shards.plan(seen, A).mine == ()


@given(st.integers(1, 64), st.integers(1, 9), st.randoms(use_true_random=False))
def test_whoever_looks_when_the_shares_come_out_even(of: int, replicas: int, chance: random.Random) -> None:
    living = [uuid.UUID(int=number) for number in range(replicas)]
    owners: list[uuid.UUID | None] = [chance.choice([*living, None]) for _ in range(of)]
    for _ in range(3):
        for me in chance.sample(living, len(living)):
            plan = shards.plan(division(of, owners, [of] * replicas), me)
            for one in plan.give_up:
                owners[one.shard] = None
            for one in plan.take:
                owners[one.shard] = me
    held = [owners.count(one) for one in living]
    assert sum(held) == of
    assert max(held) - min(held) <= 1


class Log:
    """A log of users' events, read by shards as the user service has it."""

    def __init__(self, events: Events, users: int) -> None:
        self._events = events
        self._users = [events.user(f"user{number}") for number in range(users)]
        self.made: list[users_pb2.UserEvent] = []

    def grow(self, count: int, chance: random.Random) -> None:
        self.made += [self._events.updated(chance.choice(self._users), locale="de") for _ in range(count)]

    def batch(self, hold: Hold, cursor: Cursor, size: int, late: int = 0) -> Batch:
        """What comes after a cursor; without a token, at the latest, or `late` events before that."""
        after = cursor.position
        if cursor.resume_token is None and cursor.floors:
            times = [one.commit_time.ToDatetime() for one in self.made]
            since = cursor.since.replace(tzinfo=None) if cursor.since else datetime.min  # noqa: DTZ901 - only compared
            first = next((number for number, time in enumerate(times) if time >= since), len(times))
            assert first <= after
            after = max(first - late, 0)
        passed = self.made[after : after + size]
        mine = [one for one in passed if shard_of(one.user.id, hold.of) == hold.shard]
        position = after + len(passed)
        made = batch(*mine, after=after, token=f"{hold.shard}/{hold.of}-{position}")
        return replace(made, position=position, head_position=len(self.made), head_time=None)


def composer_of(path: Path, generation: int) -> Composer:
    """What it makes of an event has other ids in each generation: an event that is processed twice is seen."""
    text = f'[[rules]]\nname="g{generation}"\non=["UPDATED"]\ntemplate="welcome"\ncategory="c"\nchannels=["in_app"]\n'
    return Composer(rules.load(write(path / f"{generation}.toml", text)), Templates(), lanes.writers(SENDER, ()))


async def held(connection: Connection, owner: uuid.UUID) -> list[Hold]:
    return await leases.take(connection, owner, (await leases.look(connection)).shards)


async def divide(connection: Connection, of: int) -> None:
    assert await leases.divide(connection, await leases.look(connection), of)


async def read(connection: Connection, hold: Hold) -> Cursor:
    cursor = await rows.read_shard(connection, hold)
    assert cursor is not None
    return replace(cursor, log_id=LOG_ID)


async def effects(connection: Connection) -> list[int]:
    """The positions of the events that made something, as often as they did. The order of each user is kept."""
    found = await (
        await connection.execute("SELECT user_id, event_position FROM notifications ORDER BY position")
    ).fetchall()
    for user_id in {one for one, _ in found}:
        positions = [position for one, position in found if one == user_id]
        assert positions == sorted(positions)
    [[dense]] = await (
        await connection.execute("SELECT count(*) = coalesce(max(position), 0) FROM notifications")
    ).fetchall()
    assert dense
    return sorted(position for _, position in found)


@pytest.mark.parametrize("seed", range(6))
async def test_the_number_of_shards_changes_and_no_event_is_lost_or_processed_again(
    connection: Connection, events: Events, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    log, owner = Log(events, 9), uuid.uuid4()
    await rows.read_cursor(connection)
    log.grow(5, chance)
    numbers = [1 if seed % 2 else 3, *(chance.choice([1, 2, 3, 4, 7]) for _ in range(6)), 1]
    for generation, of in enumerate(numbers):
        await divide(connection, of)
        log.grow(chance.randrange(12), chance)
        inbox = Inbox(composer_of(tmp_path, generation), lambda: None)
        holds = await held(connection, owner)
        assert [one.shard for one in holds] == list(range(of))
        # Some shards get on, others not at all.
        for hold in chance.choices(holds, k=chance.randrange(3 * of)):
            cursor = await read(connection, hold)
            await inbox.store(connection, cursor, log.batch(hold, cursor, chance.randrange(1, 9), late=2), hold)
    [hold] = await held(connection, owner)
    while (cursor := await read(connection, hold)).position < len(log.made) or cursor.floors:
        await inbox.store(connection, cursor, log.batch(hold, cursor, 5), hold)
    assert await effects(connection) == [one.position for one in log.made]
    # The row of the inbox is as a release that knows no shards has it.
    whole = await rows.read_cursor(connection)
    assert (whole.log_id, whole.resume_token, whole.position) == (LOG_ID, f"0/1-{len(log.made)}", len(log.made))


async def test_who_held_a_shard_stores_nothing_from_the_next_epoch_on(
    connection: Connection, events: Events, tmp_path: Path
) -> None:
    log, inbox, chance = Log(events, 5), Inbox(composer_of(tmp_path, 0), lambda: None), random.Random(1)
    log.grow(10, chance)
    one, other = uuid.uuid4(), uuid.uuid4()
    await rows.read_cursor(connection)
    await divide(connection, 2)

    async def is_fenced(hold: Hold) -> bool:
        cursor = replace((await rows.read_cursor(connection)), position=0, resume_token=None, log_id=LOG_ID)
        before = await effects(connection)
        try:
            await inbox.store(connection, cursor, log.batch(hold, cursor, 10), hold)
        except HoldLostError:
            assert await effects(connection) == before
            return True
        return False

    first, second = await held(connection, one)
    taken = await leases.take(connection, other, [Shard(0, 2, first.epoch, one)])
    assert taken == [Hold(other, 0, 2, first.epoch + 1)]
    assert await is_fenced(first)
    assert not await is_fenced(second)
    # Who looked before that takes nothing.
    assert await leases.take(connection, one, [Shard(0, 2, first.epoch, one)]) == []
    await leases.give_up(connection, other, [0])
    assert await is_fenced(taken[0])
    [again] = await leases.take(connection, one, [Shard(0, 2, taken[0].epoch, None)])
    # The owner is the same, the epoch is not.
    assert await is_fenced(first)
    await divide(connection, 2)
    assert await is_fenced(again)
    # A feed that was set to one place is nobody's until it is divided anew.
    hold = (await held(connection, one))[0]
    await rows.lock_place(connection)
    await rows.reset(connection, Cursor(LOG_ID, "token-7", 7, 0, 0), None)
    assert await is_fenced(hold)
    seen = await leases.look(connection)
    assert not seen.divided
    assert await leases.divide(connection, seen, 2)
    assert not await leases.divide(connection, seen, 3)
    for hold in await held(connection, one):
        cursor = await read(connection, hold)
        assert (cursor.position, cursor.floors) == (7, ((7,),))
        await inbox.store(connection, cursor, log.batch(hold, cursor, 10), hold)
    mine = [event.position for event in log.made if shard_of(event.user.id, 2) == 1 or event.position > 7]
    assert await effects(connection) == mine


async def test_a_shard_that_is_being_stored_into_is_left_until_the_server_ends_it(
    url: str, connection: Connection
) -> None:
    await rows.read_cursor(connection)
    await divide(connection, 2)
    owner = uuid.uuid4()
    hold = (await held(connection, owner))[0]
    async with await database.connect(url, "paused", idle_in_transaction_session_timeout="1500ms") as paused:
        locked, _ = await rows.lock_cursor(paused, [], hold)
        assert locked is not None
        seen = await leases.look(connection)
        assert [one.shard for one in await leases.take(connection, uuid.uuid4(), seen.shards)] == [1]
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await leases.divide(connection, seen, 3)
        assert [(one.shard, one.of) for one in (await leases.look(connection)).shards] == [(0, 2), (1, 2)]

        async def taken() -> bool:
            return bool(await leases.take(connection, uuid.uuid4(), seen.shards[:1]))

        await eventually(taken)
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            await paused.execute("COMMIT")


async def test_a_lease_that_is_over_frees_the_shards(connection: Connection) -> None:
    await rows.read_cursor(connection)
    await divide(connection, 2)
    one, other = Replica(uuid.uuid4(), 2), Replica(uuid.uuid4(), 2)
    await leases.beat(connection, one, "one", 60.0)
    await leases.beat(connection, other, "other", 60.0)
    await held(connection, one.id)
    seen = await leases.look(connection)
    assert [(shard.owner, shard.epoch) for shard in seen.shards] == [(one.id, seen.shards[0].epoch)] * 2
    assert seen.replicas == (one, other)
    assert [shard.owner for shard in (await standing.inbox_state(connection)).shards] == ["one", "one"]
    await connection.execute("UPDATE replicas SET lease_until = now() WHERE id = %s", (one.id,))
    seen = await leases.look(connection)
    assert [shard.owner for shard in seen.shards] == [None, None]
    assert seen.replicas == (other,)
    assert [shard.owner for shard in (await standing.inbox_state(connection)).shards] == ["", ""]
    # It was paused, and nobody took them: they are still its own.
    await leases.beat(connection, one, "one", 60.0)
    assert [shard.owner for shard in (await leases.look(connection)).shards] == [one.id, one.id]
    await leases.leave(connection, one.id)
    seen = await leases.look(connection)
    assert ([shard.owner for shard in seen.shards], seen.replicas) == ([None, None], (other,))
    await connection.execute("UPDATE replicas SET lease_until = now() - interval '2 minutes'")
    await leases.beat(connection, one, "one", 60.0)
    assert await (await connection.execute("SELECT name FROM replicas")).fetchall() == [("one",)]


@dataclass
class Scripted:
    """A feed of which only the beginnings of streams matter, by where they start."""

    begins: dict[str, int]
    head: int
    log_id: uuid.UUID = LOG_ID
    starts: list[str] = field(default_factory=list)

    def open(self, cursor: CursorStore, shard: tuple[int, int], start: Start) -> AsyncGenerator[Batch, None]:
        return self._read("since" if isinstance(start, datetime) else start)

    async def _read(self, start: str) -> AsyncGenerator[Batch, None]:
        self.starts.append(start)
        yield replace(batch(after=self.begins[start], token="begun"), head_position=self.head)
        await asyncio.Event().wait()

    async def id(self) -> uuid.UUID:
        return self.log_id


@pytest.mark.parametrize(
    ("scripted", "refused", "starts"),
    [
        (Scripted({"since": 5}, 9), "", ["since"]),
        # Its time is of long ago, or none that fits: the earliest is looked at.
        (Scripted({"since": 6, "earliest": 5}, 9), "", ["since", "earliest"]),
        (Scripted({"since": 6, "earliest": 6}, 9), "POSITION_EXPIRED", ["since", "earliest"]),
        (Scripted({"since": 3}, 4), "FUTURE_TOKEN", ["since"]),
        (Scripted({"since": 3}, 9, uuid.uuid4()), "FOREIGN_TOKEN", []),
    ],
)
async def test_a_new_shard_begins_where_nothing_is_left_out_or_not_at_all(
    pool: Pool, connection: Connection, composer: Composer, scripted: Scripted, refused: str, starts: list[str]
) -> None:
    await rows.read_cursor(connection)
    await rows.lock_place(connection)
    await rows.reset(connection, Cursor(LOG_ID, "token-5", 5, 0, 0), datetime.fromisoformat("2026-01-01T00:00:00Z"))
    await divide(connection, 2)
    hold = (await held(connection, uuid.uuid4()))[0]
    follower = Follower(hold, pool, Inbox(composer, lambda: None), Source(scripted.open, scripted.id))
    follower.start()

    async def begun() -> bool:
        return (await read(connection, hold)).resume_token == "begun"

    try:
        await eventually((lambda: follower.refused) if refused else begun)
        assert follower.refused == (f"the user feed cannot be followed: {refused}" if refused else "")
        assert scripted.starts == starts
        assert await begun() != bool(refused)
        # Somebody else takes it: the follower ends by itself.
        await leases.take(connection, uuid.uuid4(), [Shard(hold.shard, hold.of, hold.epoch, hold.owner)])
        if refused:
            await eventually(follower.has_ended)
    finally:
        await follower.stop(1.0)


async def test_shards_store_at_the_same_time_at_dense_positions(
    url: str, connection: Connection, events: Events, tmp_path: Path
) -> None:
    log, inbox, chance = Log(events, 40), Inbox(composer_of(tmp_path, 0), lambda: None), random.Random(1)
    log.grow(200, chance)
    await rows.read_cursor(connection)
    await divide(connection, 4)
    holds = await held(connection, uuid.uuid4())

    async def follow(hold: Hold, own: Connection) -> Cursor:
        cursor = await read(own, hold)
        while cursor.position < 200:
            cursor = await inbox.store(own, cursor, log.batch(hold, cursor, 10), hold)
        return cursor

    async with AsyncExitStack() as stack:
        own: list[Any] = [await stack.enter_async_context(await database.connect(url, "own")) for _ in holds]
        await asyncio.gather(*map(follow, holds, own))
    assert await effects(connection) == list(range(1, 201))
    state = await standing.inbox_state(connection)
    assert (state.log_id, state.position, state.notifications) == (str(LOG_ID), 200, 200)
    assert [(one.index, one.position, one.lag_events) for one in state.shards] == [(n, 200, 0) for n in range(4)]
