"""CreateUser: how much of an empty RPC's throughput is left once users are stored and told of, and what pgbench does.

The measured server is the shipped one: validation, request_id, distinct users, one conflict in a hundred. pgbench runs
one statement that inserts the same three rows into a database of its own, in any order and without a feed, from 32
clients.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from psycopg import AsyncConnection

from bench.measure import Sizes, Value, ratios
from bench.stack import Stack

SIZES = Sizes(rounds=5, seconds=5)
QUICK = Sizes(rounds=3, seconds=2)

_CALLERS = 64
# How long a snapshot is held, in rounds' seconds.
_SNAPSHOT = 12

SEQUENCE = "CREATE SEQUENCE IF NOT EXISTS bench_position START 1000000000000"
STATEMENT = """
WITH u AS (
    INSERT INTO users
        (id, username, email, email_key, display_name, locale, time_zone, labels, create_time, update_time)
    SELECT i, 'pg-' || i, i || '@example.com', i || '@example.com', 'Αθηνά Παπαδοπούλου', 'el-GR', 'Europe/Athens',
        '{"team": "red"}', now(), now()
    FROM (SELECT gen_random_uuid() AS i) AS one RETURNING id
), e AS (
    INSERT INTO user_events
        (position, event_id, user_id, shard_hash, type, changed_fields, group_end, commit_time, element)
    SELECT nextval('bench_position'), gen_random_uuid(), id, 1, 1, 2, true, now(), decode(repeat('ab', 330), 'hex')
    FROM u
)
INSERT INTO answers (request_id, caller, method, body_hash, response, create_time)
SELECT gen_random_uuid(), '', 'CreateUser', '\\x00112233445566778899aabbccddeeff',
    decode(repeat('ab', 180), 'hex'), now()
FROM u;
"""


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """By turns with the echo: one replica and pgbench, one replica while a snapshot is held open, two replicas."""
    rounds, seconds, snapshot_seconds = sizes.rounds, sizes.seconds, sizes.seconds * _SNAPSHOT
    echo, first = await stack.floor("bench.echo"), await stack.users()
    floor = await stack.database("floor")
    async with await AsyncConnection.connect(floor, autocommit=True) as connection:
        await connection.execute(SEQUENCE)

    async def creations(*addresses: str) -> dict[str, Any]:
        return await stack.run("create", list(addresses), callers=_CALLERS, seconds=seconds)

    await creations(first)
    echoed, one, pgbench, p99 = [], [], [], []
    for _ in range(rounds):
        echoed.append((await creations(echo))["per_second"])
        measured = await creations(first)
        one.append(measured["per_second"])
        p99.append(measured["p99"] * 1000)
        pgbench.append(await stack.pgbench(floor, STATEMENT, 32, seconds))
    yield Value("echo, 64 callers", "calls/s", tuple(echoed))
    yield Value("CreateUser, 64 callers", "users/s", tuple(one))
    yield Value("CreateUser, 64 callers, p99", "ms", tuple(p99))
    yield Value("pgbench, 32 clients, same rows", "transactions/s", tuple(pgbench))
    yield ratios("CreateUser / echo", one, echoed)
    yield ratios("CreateUser / pgbench", one, pgbench)

    async with await AsyncConnection.connect(stack.url, autocommit=True) as holder:
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT count(*) FROM feed")
        await stack.run("create", [first], callers=_CALLERS, seconds=snapshot_seconds)
        held, echoed = [], []
        for _ in range(rounds):
            echoed.append((await creations(echo))["per_second"])
            held.append((await creations(first))["per_second"])
    yield ratios(f"CreateUser / echo, a snapshot held open for {snapshot_seconds} s and more", held, echoed)

    second = await stack.users()
    await creations(first, second)
    two, echoed = [], []
    for _ in range(rounds):
        echoed.append((await creations(echo))["per_second"])
        two.append((await creations(first, second))["per_second"])
    yield Value("CreateUser, 64 callers, 2 replicas", "users/s", tuple(two))
    yield ratios("CreateUser, 2 replicas / echo", two, echoed)
