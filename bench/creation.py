"""CreateUser: how much of an empty RPC's throughput is left once users are stored and told of, and what pgbench does.

The measured server is the shipped one: validation, request_id, distinct users, one conflict in a hundred. pgbench runs
one statement that inserts the same three rows, in any order and without a feed, from 32 clients.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from psycopg import AsyncConnection

from bench.measure import Value, percentile, ratios
from bench.stack import Stack

_CALLERS = 64

_SEQUENCE = "CREATE SEQUENCE IF NOT EXISTS bench_position START 1000000000000"
_STATEMENT = """
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


async def run(stack: Stack, rounds: int, seconds: int, snapshot_seconds: int) -> AsyncIterator[Value]:
    """Echo, one replica, two replicas and pgbench by turns; then one replica while a snapshot is held open."""
    echo, first, second = await stack.echo(), await stack.users(), await stack.users()
    async with await AsyncConnection.connect(stack.url, autocommit=True) as connection:
        await connection.execute(_SEQUENCE)
    for address in (first, second):
        await stack.run("create", [address], callers=_CALLERS, seconds=2)

    by_name: dict[str, list[float]] = {"echo": [], "one": [], "two": [], "pgbench": []}
    p99: list[float] = []
    for _ in range(rounds):
        by_name["echo"].append((await stack.run("create", [echo], callers=_CALLERS, seconds=seconds))["per_second"])
        one = await stack.run("create", [first], callers=_CALLERS, seconds=seconds)
        by_name["one"].append(one["per_second"])
        p99.append(percentile(one["times"], 0.99) * 1000)
        two = await stack.run("create", [first, second], callers=_CALLERS, seconds=seconds)
        by_name["two"].append(two["per_second"])
        by_name["pgbench"].append(await stack.pgbench(_STATEMENT, 32, seconds))
    yield Value("echo, 64 callers", "calls/s", tuple(by_name["echo"]))
    yield Value("CreateUser, 64 callers", "users/s", tuple(by_name["one"]))
    yield Value("CreateUser, 64 callers, p99", "ms", tuple(p99))
    yield Value("CreateUser, 64 callers, 2 replicas", "users/s", tuple(by_name["two"]))
    yield Value("pgbench, 32 clients, same rows", "transactions/s", tuple(by_name["pgbench"]))
    yield ratios("CreateUser / echo", by_name["one"], by_name["echo"])
    yield ratios("CreateUser, 2 replicas / echo", by_name["two"], by_name["echo"])
    yield ratios("CreateUser / pgbench", by_name["one"], by_name["pgbench"])

    async with await AsyncConnection.connect(stack.url, autocommit=True) as holder:
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT count(*) FROM feed")
        await stack.run("create", [first], callers=_CALLERS, seconds=snapshot_seconds)
        held, free = [], []
        for _ in range(rounds):
            held.append((await stack.run("create", [first], callers=_CALLERS, seconds=seconds))["per_second"])
            free.append((await stack.run("create", [echo], callers=_CALLERS, seconds=seconds))["per_second"])
    yield ratios(f"CreateUser / echo, a snapshot held open for {snapshot_seconds} s and more", held, free)
