"""Digests while processes die at any statement: every item is in one mail, none is lost and none is said twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notification_service.compose import Composer
from notification_service.digester import Digester
from notification_service.domain import Notification
from notification_service.store import digests as store
from notification_service.store import feed as rows
from servicekit import database
from servicekit.database import Connection, Pool
from tests.notifications.conftest import Events
from tests.notifications.digesting import LEASE, Site, renamed, said
from tidings.notifications.v1 import digests_pb2
from tidings.users.v1 import users_pb2


class KilledError(psycopg.OperationalError):
    """The process has died, as far as the database can tell."""


class Mortal:
    """A connection over which so many statements are sent, the last without an answer; then it is gone."""

    def __init__(self, real: Connection, left: Any) -> None:
        self._real = real
        self._left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def _die(self) -> None:
        if next(self._left) == 0:
            await self._real.close()
            raise KilledError

    async def execute(self, *arguments: Any, **options: Any) -> Any:
        await self._die()
        answer = await self._real.execute(*arguments, **options)
        await self._die()
        return answer

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        async with self._real.transaction():
            yield
        await self._die()


class MortalPool:
    """A pool whose user dies after so many statements."""

    def __init__(self, url: str, life: int) -> None:
        self._url = url
        self._left = itertools.count(life, -1)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Mortal]:
        async with await database.connect(self._url, "mortal") as opened:
            yield Mortal(opened, self._left)


# After so many statements, before or after what they do.
lives = st.none() | st.integers(0, 30)
changes = st.lists(
    st.tuples(st.sampled_from(["rename"] * 4 + ["move", "move", "delete"]), st.integers(0, 1)), min_size=1, max_size=4
)
minutes = st.sampled_from([1, 30, 61, 61, 61])
closings = st.one_of(
    st.tuples(st.sampled_from(["close", "flush"]), lives),
    st.tuples(st.sampled_from(["close twice", "begin to close", "go on to close", "store meanwhile"]), st.none()),
)


@dataclass(frozen=True, slots=True)
class Round:
    """What happens is stored, and somebody dies over it; some time passes; somebody closes, and dies over that."""

    happens: list[tuple[str, int]]
    life: int | None
    minutes: int
    closings: list[tuple[str, int | None]]


rounds = st.builds(Round, changes, lives, minutes, st.lists(closings, max_size=3))


@dataclass
class Play:
    """Steps on a database of its own kind of users, and what must come of it."""

    site: Site
    url: str
    events: Events
    users: list[users_pb2.User]
    # Addresses by event: who is to hear of it.
    told: dict[int, set[str]] = field(default_factory=dict)
    waiting: list[users_pb2.UserEvent] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    flushed: set[str] = field(default_factory=set)
    # What one who is paused has taken and said, but not stored.
    paused: list[Notification] = field(default_factory=list)

    async def go(self, one: Round) -> None:
        """One round."""
        for change, which in one.happens:
            self.happen(change, which)
        await self.store(one.life)
        await self.site.pass_time(timedelta(minutes=one.minutes))
        for kind, life in one.closings:
            await self.closing(kind, life)

    async def closing(self, kind: str, life: int | None) -> None:
        """One way to close."""
        if kind == "close":
            await self.close(life)
        elif kind == "flush":
            await self.flush(life)
        elif kind == "close twice":
            await asyncio.gather(self.close(None), self.close(None))
        elif kind == "store meanwhile":
            await self.closing("begin to close", None)
            for which in range(2):
                self.happen("rename", which)
            await self.store(None)
            await self.closing("go on to close", None)
        elif kind == "begin to close":
            taken = await store.take(self.site.connection, 5, LEASE)
            views = await store.items(self.site.connection, [one.id for one in taken])
            self.paused += [said(self.site, one, views[one.id]) for one in taken]
        else:
            await store.close(self.site.connection, self.paused)
            self.paused.clear()

    def happen(self, kind: str, which: int) -> None:
        user = self.users[which]
        if kind == "delete":
            event = self.events.deleted(user)
            self.ended[user.id] = event.position
        elif kind == "rename":
            event = renamed(self.events, user, f"Name {user.version}")
            self.told[event.position] = {user.email}
        else:
            event = self.events.updated(user, email=f"{user.username}{user.version}@example.com")
            self.told[event.position] = {user.email, event.user.email}
        if kind != "delete":
            self.users[which] = event.user
        self.waiting.append(event)

    async def store(self, life: int | None) -> None:
        over = {one.id for one in await self.site.digests() if one.state != digests_pb2.Digest.OPEN}
        if life is not None:
            async with MortalPool(self.url, life).connection() as mortal:
                with contextlib.suppress(psycopg.OperationalError):
                    await self.site.store(*self.waiting, connection=cast("Connection", mortal))
        cursor = await rows.read_cursor(self.site.connection)
        # The answer to its COMMIT may have been lost with it.
        left = [event for event in self.waiting if event.position > cursor.position]
        if left:
            await self.site.store(*left)
        for event in self.waiting:
            if event.type == users_pb2.UserEvent.DELETED:
                await self.check_deleted(event, over)
        self.waiting.clear()

    async def check_deleted(self, event: users_pb2.UserEvent, over: set[str]) -> None:
        """What was gathered for a user before the end, and not said, is never said."""
        found = await self.site.all(
            "SELECT digest_id::text, state FROM digest_items JOIN digests ON digests.id = digest_id"
            f" WHERE user_id = '{event.user.id}' AND (view->'event'->>'position')::bigint < {event.position}"
        )
        assert all(identity in over or state == digests_pb2.Digest.CANCELLED for identity, state in found)

    def closer(self, life: int | None) -> Digester:
        return self.site.digester(None if life is None else cast("Pool", MortalPool(self.url, life)))

    async def close(self, life: int | None) -> None:
        with contextlib.suppress(psycopg.OperationalError):
            await self.closer(life).close_due()

    async def flush(self, life: int | None) -> None:
        opened = [one for one in await self.site.digests() if one.state == digests_pb2.Digest.OPEN]
        if opened:
            self.flushed.add(opened[-1].id)
            with contextlib.suppress(psycopg.OperationalError):
                await self.closer(life).flush(uuid.UUID(opened[-1].id))

    async def check(self) -> None:
        """Once all is over: every item is in one mail, or was cancelled with its user."""
        found = {one.id: one for one in await self.site.digests()}
        assert {one.state for one in found.values()} <= {digests_pb2.Digest.CLOSED, digests_pb2.Digest.CANCELLED}
        placed = await self.site.all(
            "SELECT digest_id::text, number, (view->'event'->>'position')::bigint, view->'user'->>'id'"
            " FROM digest_items"
        )
        cancelled: Counter[tuple[str, int]] = Counter()
        for identity, _, position, user_id in placed:
            if found[identity].state == digests_pb2.Digest.CANCELLED:
                cancelled[found[identity].target, position] += 1
                assert position < self.ended[user_id]
        mailed: Counter[tuple[str, int]] = Counter()
        mails = await self.site.mails()
        for delivery in await self.site.deliveries():
            if not (text := mails[delivery.id].text).startswith("one"):
                mailed.update((delivery.target, int(position)) for position in re.findall(r"\[(\d+) ", text))
        wanted = Counter((address, position) for position, addresses in self.told.items() for address in addresses)
        assert mailed + cancelled == wanted
        for identity, one in found.items():
            numbers = sorted(number for digest, number, *_ in placed if digest == identity)
            assert numbers == list(range(1, len(one.item_notification_ids) + 1))
            assert len(numbers) <= 3
            closes, ended = one.close_time.ToDatetime(), one.end_time.ToDatetime()
            if one.state == digests_pb2.Digest.CLOSED:
                assert closes <= ended
                if len(numbers) < 3 and identity not in self.flushed:
                    assert closes - one.open_time.ToDatetime() == timedelta(hours=1)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rounds, min_size=2, max_size=5))
async def test_every_item_is_in_one_mail_whoever_dies(
    digesting: Composer, url: str, pool: Pool, played: list[Round]
) -> None:
    events = Events()
    async with await database.connect(url, "play") as connection:
        await connection.execute(
            "TRUNCATE notifications, deliveries, contents, attempts, digests, digest_items, inbox CASCADE"
        )
        await rows.read_cursor(connection)
        site = Site(digesting, pool, connection)
        play = Play(site, url, events, [events.user("ada"), events.user("bob")])
        for one in played:
            await play.go(one)
        await site.close_all()
        await play.closing("go on to close", None)
        await play.check()
