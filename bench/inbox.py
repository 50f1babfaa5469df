"""Events into the inbox of the notification service, against its client alone and Postgres alone.

Users are created, change their addresses and are deleted (bench.filling); by the default rules nearly every event makes
a notification, with a rendered text for the app, and mails. A round commits a backlog by COPY beside the user service,
as another replica would commit it; the time is from then until the last event's effects are stored. Sending is kept
from competing: there is no mail server, the breaker is open. The client alone is `tidings.client.UserFeed`, which
parses the same events. Postgres alone stores the same rows from a table of its own, with the same indexes and foreign
keys, 1,000 events a transaction. Rounds take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import LiteralString

import psycopg

from bench import filling
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack, own_processor, processor

SIZES = Sizes(rounds=3, events=50_000)
QUICK = Sizes(rounds=1, events=5_000)

# Replicas, and shards of the feed.
_SHARED = ((1, 1), (1, 2), (2, 2))
_TRANSACTION = 1000
_LOOK = 0.02

# No sending: nobody listens there, and nobody asks for long.
_AWAY = {
    "TIDINGS_NOTIFICATIONS_SMTP_PORT": "9",
    "TIDINGS_NOTIFICATIONS_BREAKER_FAILURES": "1",
    "TIDINGS_NOTIFICATIONS_BREAKER_PAUSE": "3600",
    "TIDINGS_NOTIFICATIONS_BREAKER_CAP": "3600",
}

_TABLES: tuple[LiteralString, ...] = ("notifications", "deliveries", "contents")
_STAGE: tuple[LiteralString, ...] = (
    *(f"CREATE TABLE floor_{name} (LIKE {name} INCLUDING ALL)" for name in _TABLES),
    "ALTER TABLE floor_deliveries ADD FOREIGN KEY (notification_id) REFERENCES floor_notifications ON DELETE CASCADE",
    "ALTER TABLE floor_contents ADD FOREIGN KEY (delivery_id) REFERENCES floor_deliveries ON DELETE CASCADE",
)
_COLUMNS = """
SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
WHERE attnum > 0 AND NOT attisdropped AND attrelid = %s::text::regclass
"""
_COPIES: tuple[tuple[LiteralString, LiteralString], ...] = (
    ("notifications", "SELECT * FROM notifications WHERE event_position > %s ORDER BY position"),
    (
        "deliveries",
        """SELECT deliveries.*, event_position FROM deliveries JOIN notifications ON notifications.id = notification_id
        WHERE event_position > %s ORDER BY deliveries.position""",
    ),
    (
        "contents",
        """SELECT contents.*, event_position FROM contents JOIN deliveries ON deliveries.id = delivery_id
        JOIN notifications ON notifications.id = notification_id
        WHERE event_position > %s ORDER BY deliveries.position""",
    ),
)


class _Floor:
    """Postgres alone: the rows of a round into tables like the service's."""

    def __init__(self, connection: filling.Connection) -> None:
        self._connection = connection

    async def make(self) -> None:
        """The tables."""
        for statement in _STAGE:
            await self._connection.execute(statement)

    async def store(self, after: int, events: int) -> float:
        """Seconds that it takes to store again what events after a position have become."""
        for name, query in _COPIES:
            await self._connection.execute(f"DROP TABLE IF EXISTS staged_{name}")
            text = query.replace("%s", str(int(after))).encode()
            await self._connection.execute(f"CREATE UNLOGGED TABLE staged_{name} AS ".encode() + text)
            await self._connection.execute(f"CREATE INDEX ON staged_{name} (event_position)")
            await self._connection.execute(f"ANALYZE staged_{name}")
        stores = [await self._store(name) for name in _TABLES]
        begun = time.perf_counter()
        for first in range(after, after + events, _TRANSACTION):
            async with self._connection.transaction():
                for store in stores:
                    await self._connection.execute(store, [first, first + _TRANSACTION])
        return time.perf_counter() - begun

    async def _store(self, name: LiteralString) -> bytes:
        cursor = await self._connection.execute(_COLUMNS, [name])
        ((columns,),) = await cursor.fetchall()
        return (
            f"INSERT INTO floor_{name} ({columns}) SELECT {columns} FROM staged_{name}"
            " WHERE event_position > %s AND event_position <= %s"
        ).encode()


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """One way to share the feed after the other, each with databases of its own."""
    for replicas, shards in _SHARED:
        what = f"inbox, {replicas} x {shards} shards" if shards > 1 else "inbox"
        speeds: defaultdict[str, list[float]] = defaultdict(list)
        costs: defaultdict[str, list[float]] = defaultdict(list)
        users_url = await stack.database(f"users_{replicas}_{shards}")
        url = await stack.database(f"notifications_{replicas}_{shards}", "notifications")
        users = await stack.users(users_url)
        shared = {"TIDINGS_NOTIFICATIONS_SHARDS": str(shards)}
        inboxes = await asyncio.gather(*(stack.notifications(url, users, **_AWAY, **shared) for _ in range(replicas)))
        changing = filling.Changing()
        async with (
            await psycopg.AsyncConnection.connect(users_url, autocommit=True) as log,
            await psycopg.AsyncConnection.connect(url, autocommit=True) as stored,
        ):
            await _until(stored, 0, shards)
            floor = _Floor(stored)
            await floor.make()
            pids = [stack.pids[address] for address in inboxes]
            head = 0
            for number in range(-1, sizes.rounds):
                events = sizes.events if number >= 0 else min(sizes.events, 5000)
                before, head = head, await filling.append(log, events, changing)
                began = time.perf_counter(), _used(stack, users, pids)
                await _until(stored, head, shards)
                took, used = time.perf_counter() - began[0], _used(stack, users, pids)
                read = await stack.measure("bench.reading", "feed", "--address", users, "--events", head)
                floored = -processor(stack.postgres_pid)
                floor_took = await floor.store(before, events)
                floored += processor(stack.postgres_pid)
                if number < 0:  # warms caches, and prepares statements
                    continue
                speeds[what].append(events / took)
                speeds["client alone"].append(head / read["seconds"])
                speeds["Postgres alone"].append(events / floor_took)
                for side, seconds in used.items():
                    costs[f"{what}: {side}"].append((seconds - began[1][side]) / events * 1e6)
                costs["client alone"].append(read["processor"] / head * 1e6)
                costs["Postgres alone"].append(floored / events * 1e6)
            made = await (await stored.execute("SELECT notification_position, delivery_position FROM inbox")).fetchall()
            print(f"# {what}: {head:,} events made {made[0][0]:,} notifications with {made[0][1]:,} mails")
        for address in (*inboxes, users):
            await stack.end(address)
        for name, values in speeds.items():
            yield Value(name, "events/s", tuple(values))
        for name, values in costs.items():
            yield Value(f"{name}, processor", "µs/event", tuple(values))
        for name in ("client alone", "Postgres alone"):
            yield ratios(f"{what} / {name}", speeds[what], speeds[name])


def _used(stack: Stack, users: str, pids: list[int]) -> dict[str, float]:
    """The processor's seconds of all sides so far."""
    own = sum(own_processor(pid) for pid in pids)
    return {
        "service": own,
        "its templates": sum(processor(pid) for pid in pids) - own,
        "Postgres": processor(stack.postgres_pid),
        "user service": processor(stack.pids[users]),
    }


async def _until(connection: filling.Connection, position: int, shards: int) -> None:
    """Returns when the feed is shared, and all is stored of it up to a position."""
    while True:
        query = (
            "SELECT count(*) FILTER (WHERE owner IS NOT NULL), min(CASE WHEN inbox.resume_token = 'divided'"
            " THEN shards.position ELSE inbox.position END) FROM shards, inbox"
        )
        ((owned, lowest),) = await (await connection.execute(query)).fetchall()
        if owned == shards and lowest is not None and lowest >= position:
            return
        await asyncio.sleep(_LOOK)
