"""ImportUsers: one stream against pgbench with the same rows, and what CreateUser is like meanwhile.

The measured server is the shipped one: validation, a request_id each, distinct users, one conflict in a hundred. The
stream's messages, of 500 users, are made beforehand. pgbench runs one statement that inserts a user, its event and its
answer, from 32 clients.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from psycopg import AsyncConnection

from bench.creation import SEQUENCE, STATEMENT
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack, processor, result

SIZES = Sizes(rounds=5, seconds=5, events=100_000)
QUICK = Sizes(rounds=3, seconds=2, events=20_000)

_CALLERS = 8


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """By turns with pgbench; then callers of CreateUser alone, and while an import runs."""
    address, floor = await stack.users(), await stack.database("floor")
    async with await AsyncConnection.connect(floor, autocommit=True) as connection:
        await connection.execute(SEQUENCE)

    async def imported() -> float:
        measured = await stack.measure("bench.importer", "--address", address, "--users", sizes.events)
        return float(measured["per_second"])

    await imported()
    imports, pgbench, service, postgres = [], [], [], []
    for _ in range(sizes.rounds):
        before = processor(stack.pids[address]), processor(stack.postgres_pid)
        imports.append(await imported())
        service.append((processor(stack.pids[address]) - before[0]) / sizes.events * 1e6)
        postgres.append((processor(stack.postgres_pid) - before[1]) / sizes.events * 1e6)
        pgbench.append(await stack.pgbench(floor, STATEMENT, 32, sizes.seconds))
    yield Value("ImportUsers, one stream", "users/s", tuple(imports))
    yield Value("ImportUsers, processor time of the service", "µs/user", tuple(service))
    yield Value("ImportUsers, processor time of Postgres", "µs/user", tuple(postgres))
    yield Value("pgbench, 32 clients, same rows", "transactions/s", tuple(pgbench))
    yield ratios("ImportUsers / pgbench", imports, pgbench)

    alone, beside = [], []
    for _ in range(sizes.rounds):
        alone.append(await stack.run("create", [address], callers=_CALLERS, seconds=sizes.seconds))
        importing = await stack.live("bench.importer", "--address", address, "--seconds", sizes.seconds + 2)
        beside.append(await stack.run("create", [address], callers=_CALLERS, seconds=sizes.seconds))
        await result(importing)
    for name, measured in (("alone", alone), ("beside an import", beside)):
        yield Value(f"CreateUser, {_CALLERS} callers, {name}", "users/s", tuple(one["per_second"] for one in measured))
        for share in ("p50", "p99"):
            times = tuple(one[share] * 1000 for one in measured)
            yield Value(f"CreateUser, {_CALLERS} callers, {name}, {share}", "ms", times)
