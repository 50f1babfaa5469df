"""Retention: what it removes, what it leaves, and what those learn who come too late."""

from __future__ import annotations

import asyncio
import signal
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc

from tests.harness import Database, ServiceProcess, Services, until
from tests.users.calls import Refusal, Stub, create, read, refusal, refused, replay, stub_of
from tidings.users.v1 import users_pb2

Request = users_pb2.WatchUsersRequest

# Seals and removes at once what is older than 30 days.
QUICK = {"segment_events": 4, "seal_interval": 0.05, "retention_interval": 0.05, "page_cache_bytes": 0}


async def _age(made: Database, upto: int) -> None:
    """Makes the events up to a position 40 days older, sealed or not, while nobody seals them."""
    async with await made.connect() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('tidings sealer', 0))")
        await connection.execute(
            "UPDATE user_events SET commit_time = commit_time - interval '40 days' WHERE position <= %s", (upto,)
        )
        await connection.execute(
            "UPDATE segments SET last_time = last_time - interval '40 days'"
            " WHERE last_position <= %s AND last_time > now() - interval '40 days'",
            (upto,),
        )


async def _earliest(stub: Stub) -> int:
    return (await stub.GetFeed(users_pb2.GetFeedRequest())).earliest_position


async def _until_earliest(stub: Stub, position: int) -> None:
    async def there() -> bool:
        return await _earliest(stub) == position

    await until(there, what=f"the earliest position is {position}")


async def _tokens(stub: Stub) -> list[str]:
    """The token of every position from 0 on."""
    tokens: list[str] = []
    stream = stub.WatchUsers(Request(earliest={}, max_batch=1))
    async for message in stream:
        if message.HasField("caught_up"):
            break
        assert message.position == len(tokens)
        tokens.append(message.resume_token)
    stream.cancel()
    return tokens


async def _begins(stub: Stub, **start: object) -> users_pb2.WatchUsersResponse:
    stream = stub.WatchUsers(Request(**start))
    first = await read(stream)
    stream.cancel()
    return first


async def _refused(stub: Stub, **start: object) -> Refusal:
    return await refused(stub.WatchUsers(Request(**start)).read())


async def _twenty(service: ServiceProcess) -> list[str]:
    """Creates 20 users; returns the tokens of the positions from 0 on."""
    stub = stub_of(service)
    for _ in range(20):
        await stub.CreateUser(create())
    return await _tokens(stub)


def _is_expired(said: Refusal, earliest: int) -> bool:
    return (
        (said.code, said.reason) == (grpc.StatusCode.OUT_OF_RANGE, "POSITION_EXPIRED")
        and said.metadata["earliest_position"] == str(earliest)
        and "snapshot" in said.metadata["advice"]
    )


async def test_what_is_left_at_the_edge(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    tokens = await _twenty(service)
    await service.stop()
    await _age(users_database, 12)
    stub = stub_of(await services.users(users_database, **QUICK).start())
    await _until_earliest(stub, 13)
    assert await users_database.fetch("SELECT min(first_position), count(*) FROM segments") == [(None, 0)]
    assert await users_database.fetch("SELECT min(position), count(*) FROM user_events") == [(13, 8)]

    assert [event.position for event in await replay(stub)] == list(range(13, 21))
    assert (await _begins(stub, earliest={})).resume_token == tokens[12]
    for position in range(12, 21):
        assert [event.position for event in await replay(stub, tokens[position])] == list(range(position + 1, 21))
    for position in range(12):
        assert _is_expired(await _refused(stub, resume_token=tokens[position]), 13)

    [[edge, stored]] = await users_database.fetch("SELECT edge_time, edge_event_id FROM feed")
    assert isinstance(edge, datetime)
    for late in (edge, edge - timedelta(days=1), datetime(1970, 1, 1, tzinfo=UTC)):
        assert _is_expired(await _refused(stub, since=late), 13)
    assert (await _begins(stub, since=edge + timedelta(microseconds=1))).position == 12
    for first, time in await users_database.fetch("SELECT position, commit_time FROM user_events"):
        assert (await _begins(stub, since=time)).position + 1 == first

    # The edge tells histories apart like any event.
    await users_database.fetch("UPDATE feed SET edge_event_id = %s", uuid.uuid4())
    said = await _refused(stub, resume_token=tokens[12])
    assert (said.code, said.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DIVERGED_TOKEN")
    await users_database.fetch("UPDATE feed SET edge_event_id = %s", stored)
    assert (await _begins(stub, resume_token=tokens[12])).position == 12


async def test_a_log_whose_every_event_is_removed_goes_on(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    tokens = await _twenty(service)
    await service.stop()
    await _age(users_database, 20)
    service = await services.users(users_database, **QUICK).start()
    await _until_earliest(stub_of(service), 21)
    for _ in range(2):
        stub = stub_of(service)
        starts: list[dict[str, object]] = [{"earliest": {}}, {"now": {}}, {"resume_token": tokens[20]}]
        for start in starts:
            first = await _begins(stub, **start)
            assert (first.position, first.resume_token, first.bookmark.head_position) == (20, tokens[20], 20)
        assert await replay(stub) == []
        assert _is_expired(await _refused(stub, resume_token=tokens[19]), 21)
        assert _is_expired(await _refused(stub, resume_token=tokens[0]), 21)
        await service.stop()
        await service.restart()
    made = await stub_of(service).CreateUser(create())
    for token in ("", tokens[20]):
        assert [(event.position, event.user) for event in await replay(stub_of(service), token)] == [(21, made)]


async def test_what_memory_still_has_makes_no_difference(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, **QUICK).start()
    stub = stub_of(service)
    live = stub.WatchUsers(Request(now={}))
    assert (await read(live)).position == 0
    tokens = await _twenty(service)
    await _age(users_database, 12)
    await _until_earliest(stub, 13)
    # Its window holds all twenty.
    assert _is_expired(await _refused(stub, resume_token=tokens[11]), 13)
    assert [event.position for event in await replay(stub, tokens[12])] == list(range(13, 21))
    # A stream that runs goes on.
    positions: list[int] = []
    while len(positions) < 20:
        positions += [event.position for event in (await read(live)).events]
    assert positions == list(range(1, 21))
    live.cancel()


async def test_a_replica_that_slept_while_the_log_was_removed_begins_anew(
    services: Services, users_database: Database
) -> None:
    awake, asleep = [await services.users(users_database, **QUICK).start() for _ in range(2)]
    live = stub_of(asleep).WatchUsers(Request(now={}))
    assert (await read(live)).position == 0
    asleep.send(signal.SIGSTOP)
    await _twenty(awake)
    await _age(users_database, 20)
    await _until_earliest(stub_of(awake), 21)
    asleep.send(signal.SIGCONT)
    # Nothing that follows is needed for it to notice.
    await asleep.wait_log("the log was removed past this replica's place")
    said = await refused(_last(live))
    assert _is_expired(said, 21)
    for service in (asleep, awake):
        made = await stub_of(service).CreateUser(create())
        assert (await replay(stub_of(asleep)))[-1].user == made
    assert await asleep.is_ready()


async def _last(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_a_reader_whose_next_page_is_removed_is_told(services: Services, users_database: Database) -> None:
    settings = {**QUICK, "segment_events": 50, "window_bytes": 1 << 20}
    service = await services.users(users_database, **settings).start()
    # A slow machine looks to gRPC as a long way, on which it would ask for all of the log at once.
    stub = stub_of(service, ("grpc.http2.bdp_probe", 0))
    large = {f"key-{n}": "v" * 250 for n in range(30)}
    for _ in range(10):
        requests = [create(labels=large) for _ in range(100)]
        await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=requests))
    stream = stub.WatchUsers(Request(earliest={}, max_batch=10))
    position = (await read(stream)).position
    # It stops reading; what it has not been sent yet is removed.
    await _age(users_database, 900)
    await _until_earliest(stub, 901)

    async def read_on() -> None:
        nonlocal position
        while position < 1000:
            message = await read(stream)
            assert message.previous_position == position
            position = message.position

    said = await refused(read_on())
    assert position < 900
    # The server may have been told in the middle of the removal.
    earliest = int(said.metadata["earliest_position"])
    assert position < earliest <= 901
    assert _is_expired(said, earliest)
    assert [event.position for event in await replay(stub)] == list(range(901, 1001))


async def test_an_open_snapshot_holds_what_follows_it(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    tokens = await _twenty(service)
    await service.stop()
    await _age(users_database, 16)
    held, expired = uuid.uuid4(), uuid.uuid4()
    await users_database.fetch(
        "INSERT INTO open_snapshots VALUES (%s, 9, now() + interval '1 hour'), (%s, 1, now() - interval '1 second')",
        held, expired,
    )  # fmt: skip
    stub = stub_of(await services.users(users_database, **QUICK).start())
    await _until_earliest(stub, 9)
    await until(lambda: _is(users_database, "SELECT count(*) FROM segments", 2))
    assert await _earliest(stub) == 9
    assert [event.position for event in await replay(stub, tokens[9])] == list(range(10, 21))
    await until(lambda: _is(users_database, "SELECT count(*) FROM open_snapshots", 1))
    await users_database.fetch("UPDATE open_snapshots SET expire_time = now()")
    await _until_earliest(stub, 17)


async def _is(made: Database, query: str, value: object) -> bool:
    return await made.fetch(query) == [(value,)]


async def test_by_size(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    await _twenty(service)
    await service.stop()
    settings = {**QUICK, "unsealed_events": 0}
    service = await services.users(users_database, **settings).start()
    await until(lambda: _is(users_database, "SELECT count(*) FROM segments", 5))
    assert await _earliest(stub_of(service)) == 1
    assert not service.events("events are kept by size: subscribers may lose their place")
    await service.stop()
    sizes = await users_database.fetch("SELECT size FROM segments ORDER BY first_position DESC")
    limit = sum(size for (size,) in sizes[:2] if isinstance(size, int))
    service = await services.users(users_database, **settings, events_kept_bytes=limit).start()
    await service.wait_log("events are kept by size: subscribers may lose their place", bytes=limit)
    await _until_earliest(stub_of(service), 13)
    assert [event.position for event in await replay(stub_of(service))] == list(range(13, 21))
    assert await users_database.fetch("SELECT size FROM segments ORDER BY first_position DESC") == sizes[:2]


async def test_everything_at_once(services: Services, users_database: Database) -> None:
    """Writers, sealers, removers and readers on two replicas: who is not overtaken misses nothing, others are told."""
    settings = {**QUICK, "segment_events": 20, "unsealed_events": 100, "window_bytes": 1 << 20}
    replicas = [await services.users(users_database, **settings).start() for _ in range(2)]
    stubs = [stub_of(replica) for replica in replicas]
    large = {f"key-{n}": "v" * 250 for n in range(8)}
    total, writing, followed = 1500, True, [0, 0]

    async def write(stub: Stub) -> None:
        for _ in range(30):
            await asyncio.gather(*(stub.CreateUser(create(labels=large)) for _ in range(10)))
            requests = [create(labels=large) for _ in range(15)]
            await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=requests))

    async def read_again_and_again(stub: Stub) -> int:
        whole = 0
        while writing:
            try:
                await replay(stub, max_batch=25)  # fails if anything is missing or comes twice
            except grpc.aio.AioRpcError as error:
                if refusal(error).reason != "POSITION_EXPIRED":
                    raise
            whole += 1
        return whole

    async def follow(number: int) -> None:
        stream, position = stubs[number].WatchUsers(Request(earliest={})), 0
        while position < total:
            message = await read(stream)
            assert message.previous_position == position
            assert [event.position for event in message.events] == list(range(position + 1, message.position + 1))
            followed[number] = position = message.position
        stream.cancel()

    async def remove() -> None:
        while min(followed) < total:
            await _age(users_database, min(followed) - 50)

    tasks = [asyncio.create_task(one) for one in (follow(0), follow(1), remove())]
    readers = [asyncio.create_task(read_again_and_again(stub)) for stub in stubs]
    await asyncio.gather(*(write(stub) for stub in stubs))
    await asyncio.gather(*tasks)
    writing = False
    assert all(await asyncio.gather(*readers))

    async def some_are_removed() -> bool:
        return await _earliest(stubs[0]) > 1

    await until(some_are_removed)

    async def nothing_is_left() -> bool:
        await _age(users_database, total)
        return await _earliest(stubs[0]) == total + 1

    # In the end nothing is left of it, and the next event has the next position.
    await until(nothing_is_left)
    assert await users_database.fetch("SELECT count(*), (SELECT count(*) FROM segments) FROM user_events") == [(0, 0)]
    await stubs[1].CreateUser(create())
    assert [event.position for event in await replay(stubs[1])] == [total + 1]
    assert not [record for replica in replicas for record in replica.records if record.get("level") == "error"]
