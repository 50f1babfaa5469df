"""The group commit under faults: lost connections, paused and killed processes, replicas that race."""

from __future__ import annotations

import asyncio
import random
import signal
import uuid

import grpc
import pytest

from tests.harness import Action, Database, PostgresProxy, PostgresServer, Services, is_commit, sql_contains, until
from tests.users.calls import create, refused, replay, stub_of, user
from tidings.users.v1 import users_pb2

WRITER = "tidings-users-writer"


async def _check_tables(database: Database) -> None:
    """What must hold of any users database at rest."""
    [[dense]] = await database.fetch(
        "SELECT count(*) = coalesce(max(position), 0) AND coalesce(max(position), 0) ="
        " (SELECT head_position FROM feed) FROM user_events"
    )
    assert dense
    [[orphans]] = await database.fetch(
        "SELECT count(*) FROM users u WHERE (SELECT count(*) FROM user_events e WHERE e.user_id = u.id) <> u.version"
    )
    assert orphans == 0


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER])
async def test_a_connection_lost_around_commit_gives_the_true_answer(
    services: Services, users_database: Database, proxy: PostgresProxy, action: Action
) -> None:
    stub = stub_of(await services.users(proxy.url(users_database)).start())
    await stub.CreateUser(create())
    for _ in range(5):
        fault = proxy.arm(WRITER, action, is_commit)
        requests = [create() for _ in range(10)]
        made = await asyncio.gather(*(stub.CreateUser(request) for request in requests))
        await fault.happened()
        assert [found.username for found in made] == [request.user.username for request in requests]
        # And the retry of a caller that did not hear it gets the same.
        assert await stub.CreateUser(requests[0]) == made[0]
    assert len(await replay(stub)) == 51
    await _check_tables(users_database)


async def test_an_outcome_that_cannot_be_learnt_is_not_guessed(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database), unknown_outcome_wait=0.5).start()
    stub = stub_of(service)
    await stub.CreateUser(create())
    request = create()
    fault = proxy.arm(WRITER, Action.CUT_AFTER, is_commit)
    calling = asyncio.create_task(refused(stub.CreateUser(request)))
    await asyncio.sleep(0)
    proxy.refusing = True
    said = await calling
    assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
    assert fault.hits == 1
    proxy.refusing = False
    made = await stub.CreateUser(request)
    assert made.username == request.user.username

    async def both_are_news() -> bool:
        return len(await replay(stub)) == 2

    await until(both_are_news)
    await _check_tables(users_database)


@pytest.mark.parametrize("others", [0, 20], ids=["unknown", "used again"])
async def test_a_transaction_that_a_crash_has_made_unheard_of_is_aborted(others: int) -> None:
    """Postgres forgets a transaction of which nothing had reached the disk, and gives its id to another."""
    services, server = Services(), await PostgresServer.start()
    try:
        found = await server.users_database()
        # Nothing is flushed before a COMMIT asks for it.
        await found.fetch("ALTER SYSTEM SET wal_writer_delay = '10s'")
        await found.fetch("SELECT pg_reload_conf()")
        async with PostgresProxy(server.server.socket_dir) as proxy:
            service = await services.users(proxy.url(found), unknown_outcome_wait=60).start()
            stub = stub_of(service)
            first = await stub.CreateUser(create())
            fault = proxy.arm(WRITER, Action.HOLD_BEFORE, is_commit)
            calling = asyncio.ensure_future(stub.CreateUser(create()))
            await fault.happened()
            proxy.refusing = True
            await server.crash()
            for _ in range(others):
                await found.fetch("SELECT pg_current_xact_id()")
            proxy.refusing = False
            fault.release()
            made = await calling
            stored = await found.fetch("SELECT username FROM users ORDER BY id")
            assert stored == [(first.username,), (made.username,)]
            await _check_tables(found)
            assert service.events("asked for the outcome of a commit")
    finally:
        await services.stop()
        await server.stop()


async def test_without_a_database_callers_are_told_in_time(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    stub = stub_of(await services.users(proxy.url(users_database)).start())
    await stub.CreateUser(create())
    proxy.refusing = True
    proxy.cut()
    said = await refused(stub.CreateUser(create()))
    assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    proxy.refusing = False
    await stub.CreateUser(create())
    assert len(await replay(stub)) == 2


@pytest.mark.parametrize("patience", [2, 60], ids=["caller gone", "caller waits"])
async def test_a_paused_writer_that_holds_the_feed_is_passed_by(
    services: Services, users_database: Database, proxy: PostgresProxy, patience: int
) -> None:
    paused = await services.users(proxy.url(users_database)).start()
    other = stub_of(await services.users(users_database).start())
    stub = stub_of(paused)
    await stub.CreateUser(create())
    # It has the lock, and does not hear so before it is paused.
    fault = proxy.arm(WRITER, Action.HOLD_AFTER, sql_contains("FROM feed FOR UPDATE"))
    stuck = create()
    calling = asyncio.ensure_future(stub.CreateUser(stuck, timeout=patience))
    await fault.happened()
    paused.send(signal.SIGSTOP)
    fault.release()

    await asyncio.wait_for(other.CreateUser(create()), 3)
    if patience == 2:
        assert (await refused(calling)).code is grpc.StatusCode.DEADLINE_EXCEEDED
    before = await users_database.fetch("SELECT position, event_id FROM user_events ORDER BY position")
    assert len(before) == 2

    asking = proxy.arm(f"{WRITER}-outcome", Action.HOLD_AFTER, sql_contains("pg_xact_status"))
    paused.send(signal.SIGCONT)
    await asking.happened()
    # On the caller's connection: that it has gone was sent before this call, and is known once this is answered.
    await stub.GetFeed(users_pb2.GetFeedRequest())
    asking.release()
    await paused.wait_log("asked for the outcome of a commit", outcome="aborted")
    if patience == 2:
        # Nobody waits for it: it writes nothing.
        assert await users_database.fetch("SELECT position, event_id FROM user_events ORDER BY position") == before
        made = await stub.CreateUser(stuck)
    else:
        made = await calling
    assert made.username == stuck.user.username
    assert [event.position for event in await replay(other)] == [1, 2, 3]
    await _check_tables(users_database)


async def test_a_conflict_in_a_batch_fails_alone(services: Services, users_database: Database) -> None:
    stub = stub_of(await services.users(users_database).start())
    requests = [create(username="wanted") for _ in range(10)]
    requests += [create(email="wanted@example.com") for _ in range(10)]
    requests += [create() for _ in range(40)]
    random.Random(1).shuffle(requests)
    answers = await asyncio.gather(*(stub.CreateUser(request) for request in requests), return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, users_pb2.User)]
    assert len(made) == 42
    codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert codes == [grpc.StatusCode.ALREADY_EXISTS] * 18
    assert sorted(event.user.id for event in await replay(stub)) == sorted(one.id for one in made)
    await _check_tables(users_database)


async def test_two_users_who_swap_addresses_get_exact_answers(services: Services, users_database: Database) -> None:
    first = stub_of(await services.users(users_database).start())
    second = stub_of(await services.users(users_database).start())
    one, two = await first.CreateUser(create()), await first.CreateUser(create())
    mask = {"paths": ["email"]}
    for _ in range(20):
        swaps = [
            first.UpdateUser(users_pb2.UpdateUserRequest(user={"id": one.id, "email": two.email}, update_mask=mask)),
            second.UpdateUser(users_pb2.UpdateUserRequest(user={"id": two.id, "email": one.email}, update_mask=mask)),
        ]
        for said in await asyncio.gather(*(refused(swap) for swap in swaps)):
            assert (said.code, said.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    # By way of a third address it works, whatever the other asks in the meantime.
    free = user().email
    await first.UpdateUser(users_pb2.UpdateUserRequest(user={"id": one.id, "email": free}, update_mask=mask))
    await second.UpdateUser(users_pb2.UpdateUserRequest(user={"id": two.id, "email": one.email}, update_mask=mask))
    await first.UpdateUser(users_pb2.UpdateUserRequest(user={"id": one.id, "email": two.email}, update_mask=mask))
    assert len(await replay(first)) == 5
    await _check_tables(users_database)


async def test_sixteen_writers_on_two_replicas(
    services: Services, users_database: Database, postgres: PostgresServer
) -> None:
    replicas = [await services.users(users_database).start() for _ in range(2)]
    stubs = [stub_of(replica) for replica in replicas]
    live = stubs[1].WatchUsers(users_pb2.WatchUsersRequest(earliest={}))
    mark = postgres.log_mark()
    changes = 0

    async def write(number: int) -> None:
        nonlocal changes
        chance = random.Random(number)
        mine: list[users_pb2.User] = []
        for _ in range(60):
            stub = chance.choice(stubs)
            if len(mine) < 3 or chance.random() < 0.4:
                mine.append(await stub.CreateUser(create()))
            else:
                index = chance.randrange(len(mine))
                change = users_pb2.UpdateUserRequest(
                    user={"id": mine[index].id, "version": mine[index].version, "display_name": uuid.uuid4().hex},
                    update_mask={"paths": ["display_name"]},
                    request_id=str(uuid.uuid4()),
                )
                mine[index] = await stub.UpdateUser(change)
            changes += 1

    await asyncio.gather(*(write(number) for number in range(16)))
    assert changes == 960
    for stub in stubs:
        versions: dict[str, int] = {}
        last_time = 0
        for event in await replay(stub):
            assert event.user.version == versions.get(event.user.id, 0) + 1
            versions[event.user.id] = event.user.version
            assert event.commit_time.ToNanoseconds() >= last_time
            last_time = event.commit_time.ToNanoseconds()
        assert sum(versions.values()) == changes
    seen = 0
    async for message in live:
        for event in message.events:
            seen += 1
            assert event.position == seen
        if seen == changes:
            break
    live.cancel()
    assert "deadlock detected" not in postgres.log_since(mark)
    await _check_tables(users_database)


async def test_kill_9_while_writes_run_loses_and_invents_nothing(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    acknowledged: dict[str, users_pb2.User] = {}
    asked: set[str] = set()
    stop = asyncio.Event()

    async def write() -> None:
        stub = stub_of(service)
        while not stop.is_set():
            request = create()
            asked.add(request.user.username)
            while True:
                try:
                    made = await stub.CreateUser(request, timeout=5, wait_for_ready=True)
                except grpc.aio.AioRpcError:
                    if stop.is_set():
                        return
                    await asyncio.sleep(0.05)
                    continue
                acknowledged[made.username] = made
                break

    writers = [asyncio.create_task(write()) for _ in range(16)]
    for _ in range(4):
        await asyncio.sleep(0.7)
        await service.kill()
        await service.restart()
    await asyncio.sleep(0.5)
    stop.set()
    await asyncio.gather(*writers)
    assert len(acknowledged) > 100
    events = {event.user.username: event.user for event in await replay(stub_of(service))}
    assert len(events) == len(await replay(stub_of(service)))
    assert {name: events.get(name) for name in acknowledged} == acknowledged
    assert events.keys() <= asked
    await _check_tables(users_database)


async def test_sigterm_answers_every_call_that_it_took(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    calls = [asyncio.ensure_future(stub.CreateUser(create())) for _ in range(200)]
    # It is in the middle of them.
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    service.send(signal.SIGTERM)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert await service.wait() == 0
    made = {answer.username for answer in answers if isinstance(answer, users_pb2.User)}
    others = [answer for answer in answers if not isinstance(answer, users_pb2.User)]
    codes = {answer.code() for answer in others if isinstance(answer, grpc.aio.AioRpcError)}
    assert codes <= {grpc.StatusCode.UNAVAILABLE}, others
    stored = {name for (name,) in await users_database.fetch("SELECT username FROM users")}
    assert made <= stored
    assert made
