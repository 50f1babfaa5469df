"""WatchUsers: where a stream begins, what it is told, and how it ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.harness import Database, Databases, ServiceProcess, Services, until
from tests.users.calls import Stub, create, read, refusal, refused, replay, stub_of
from tidings.client.errors import api_error
from tidings.users.v1 import users_pb2

Request = users_pb2.WatchUsersRequest


async def _refused(stub: Stub, request: users_pb2.WatchUsersRequest) -> tuple[str, str]:
    said = await refused(stub.WatchUsers(request).read())
    return said.code.name, said.reason


async def _events(
    stream: AsyncIterator[users_pb2.WatchUsersResponse], count: int
) -> list[users_pb2.WatchUsersResponse]:
    """The messages up to the one that completes `count` events."""
    messages, events = [], 0
    async for message in stream:
        messages.append(message)
        events += len(message.events)
        if events >= count:
            return messages
    raise AssertionError("the stream ended")


async def test_an_empty_feed_begins_with_a_bookmark(stub: Stub) -> None:
    starts: list[dict[str, object]] = [{"earliest": {}}, {"now": {}}]
    for start in starts:
        stream = stub.WatchUsers(Request(**start))
        first, second = await read(stream), await read(stream)
        stream.cancel()
        assert first.HasField("bookmark")
        assert (first.position, first.bookmark.head_position) == (0, 0)
        assert first.resume_token
        assert second.caught_up.position == 0


async def test_since_begins_with_the_first_event_of_a_time(stub: Stub) -> None:
    for _ in range(5):
        await stub.CreateUser(create())
    await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=[create() for _ in range(3)]))
    events = await replay(stub)
    assert len({event.commit_time.ToMicroseconds() for event in events[:6]}) == 6
    assert len({event.commit_time.ToMicroseconds() for event in events[5:]}) == 1

    async def begins(seconds: int, nanos: int) -> int:
        """What the stream has passed at its start."""
        stream = stub.WatchUsers(Request(since={"seconds": seconds, "nanos": nanos}))
        first = await read(stream)
        stream.cancel()
        return first.position

    for event in events[:6]:
        at = event.commit_time
        assert await begins(at.seconds, at.nanos) == event.position - 1
        # A moment that lies between two microseconds is after the first of them.
        assert await begins(at.seconds, at.nanos + 1) == (event.position if event.position < 6 else 8)
    assert await begins(0, 0) == 0
    assert await begins(events[-1].commit_time.seconds + 3600, 0) == 8


async def test_linger_gathers_events_into_one_message(stub: Stub) -> None:
    stream = stub.WatchUsers(Request(now={}, linger={"seconds": 1}, max_batch=5))
    await read(stream)
    assert (await read(stream)).HasField("caught_up")
    for _ in range(5):
        await stub.CreateUser(create())
    # Not all of a second is waited for once a message is full.
    assert [event.position for event in (await read(stream)).events] == [1, 2, 3, 4, 5]
    await stub.CreateUser(create())
    assert [event.position for event in (await read(stream)).events] == [6]
    stream.cancel()


async def test_now_sends_only_what_comes_after(stub: Stub) -> None:
    await stub.CreateUser(create())
    stream = stub.WatchUsers(Request(now={}))
    assert (await read(stream)).position == 1
    assert (await read(stream)).HasField("caught_up")
    second = await stub.CreateUser(create())
    message = await read(stream)
    assert [event.user for event in message.events] == [second]
    assert (message.previous_position, message.position) == (1, 2)
    stream.cancel()


async def test_a_token_of_any_message_resumes_right_after_it(stub: Stub) -> None:
    for _ in range(30):
        await stub.CreateUser(create())
    stream = stub.WatchUsers(Request(earliest={}, max_batch=7))
    messages = await _events(stream, 30)
    stream.cancel()
    for message in messages:
        rest = await replay(stub, message.resume_token)
        assert [event.position for event in rest] == list(range(message.position + 1, 31))


async def test_a_token_is_good_on_another_replica_and_after_a_restart(
    services: Services, users_database: Database
) -> None:
    one, two = await services.users(users_database).start(), await services.users(users_database).start()
    first, second = stub_of(one), stub_of(two)
    for _ in range(5):
        await first.CreateUser(create())
    stream = first.WatchUsers(Request(earliest={}, max_batch=2))
    token = (await _events(stream, 2))[-1].resume_token
    stream.cancel()
    assert [event.position for event in await replay(second, token)] == [3, 4, 5]
    assert await one.stop() == 0
    await one.restart()
    assert [event.position for event in await replay(stub_of(one), token)] == [3, 4, 5]


async def test_an_idle_stream_offers_a_token_every_interval(stub: Stub) -> None:
    await stub.CreateUser(create())
    stream = stub.WatchUsers(Request(now={}, bookmark_interval={"seconds": 1}))
    marks = [(await read(stream)).WhichOneof("mark") for _ in range(4)]
    stream.cancel()
    assert marks == ["bookmark", "caught_up", "bookmark", "bookmark"]


async def test_a_stream_older_than_the_window_reads_from_postgres(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, window_bytes=1 << 20, page_cache_bytes=0).start()
    stub = stub_of(service)
    large = {f"key-{n}": "v" * 250 for n in range(30)}
    batch = [create(labels=large) for _ in range(200)]
    await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=batch))
    for _ in range(5):
        await asyncio.gather(*(stub.CreateUser(create(labels=large)) for _ in range(20)))
    stream = stub.WatchUsers(Request(earliest={}))
    positions = []
    async for message in stream:
        assert message.ByteSize() < 1 << 20
        positions += [event.position for event in message.events]
        # Two megabytes of one group are several messages, and only the last of them may be resumed from.
        assert bool(message.resume_token) == (message.position == 0 or message.position >= 200)
        if message.HasField("caught_up"):
            break
    stream.cancel()
    assert positions == list(range(1, 301))


async def test_bad_requests_are_refused_with_a_reason(stub: Stub) -> None:
    await stub.CreateUser(create())
    stream = stub.WatchUsers(Request(earliest={}))
    token = (await _events(stream, 1))[-1].resume_token
    stream.cancel()
    assert await _refused(stub, Request()) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert await _refused(stub, Request(resume_token="nonsense")) == ("INVALID_ARGUMENT", "BAD_TOKEN")
    assert await _refused(stub, Request(resume_token="ä")) == ("INVALID_ARGUMENT", "BAD_TOKEN")
    assert await _refused(stub, Request(resume_token=token[:-4])) == ("INVALID_ARGUMENT", "BAD_TOKEN")
    late = Request(earliest={}, bookmark_interval={"seconds": 400}, linger={"seconds": 2}, max_batch=20_000)
    assert (await refused(stub.WatchUsers(late).read())).fields == ["bookmark_interval", "linger", "max_batch"]
    bad: list[dict[str, int]] = [{"nanos": -1}, {"seconds": 10**15}]
    for since in bad:
        assert (await refused(stub.WatchUsers(Request(since=since)).read())).fields == ["since"]


async def test_tokens_of_another_log_or_history_are_refused(services: Services, databases: Databases) -> None:
    ours, other = await databases.users(), await databases.users()
    here, there = await services.users(ours).start(), await services.users(other).start()
    token = ""
    for stub in (stub_of(there), stub_of(here)):
        for _ in range(3):
            await stub.CreateUser(create())
        stream = stub.WatchUsers(Request(earliest={}))
        messages = await _events(stream, 3)
        stream.cancel()
        if not token:
            token = messages[-1].resume_token
    assert await _refused(stub_of(here), Request(resume_token=token)) == ("FAILED_PRECONDITION", "FOREIGN_TOKEN")

    # A restore from a backup: the log goes on from an earlier position, with other events.
    mine = messages[-1].resume_token
    assert await here.stop() == 0
    await ours.fetch("DELETE FROM user_events WHERE position = 3")
    await ours.fetch("UPDATE feed SET head_position = 2")
    await here.restart()
    assert await _refused(stub_of(here), Request(resume_token=mine)) == ("FAILED_PRECONDITION", "FUTURE_TOKEN")
    await stub_of(here).CreateUser(create())
    assert await _refused(stub_of(here), Request(resume_token=mine)) == ("FAILED_PRECONDITION", "DIVERGED_TOKEN")


async def test_a_hole_in_the_log_is_never_passed(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    for _ in range(5):
        await stub_of(service).CreateUser(create())
    assert await service.stop() == 0
    await users_database.fetch("DELETE FROM user_events WHERE position = 3")
    await service.restart()
    stub = stub_of(service)
    said = stub.WatchUsers(Request(earliest={}))
    assert not (await read(said)).events
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(said)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "position" not in (caught.value.details() or "")

    async def unready() -> bool:
        return not await service.is_ready()

    await until(unready, what="readiness is off")


async def test_sigterm_drains_every_stream(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    await stub.CreateUser(create())
    streams = [stub.WatchUsers(Request(earliest={})) for _ in range(5)]
    for stream in streams:
        await _events(stream, 1)
    service.send(signal.SIGTERM)
    for stream in streams:
        rest = [message async for message in stream]
        assert [message.WhichOneof("mark") for message in rest][-2:] == ["bookmark", "drain"]
        assert rest[-1].resume_token
        assert "shutting down" in rest[-1].drain.reason
        assert await stream.code() is grpc.StatusCode.OK
    assert await service.wait() == 0


async def test_an_old_stream_is_asked_to_reconnect(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, max_stream_age=1).start()
    stream = stub_of(service).WatchUsers(Request(now={}))
    messages = [message async for message in stream]
    assert messages[-1].WhichOneof("mark") == "drain"
    assert await stream.code() is grpc.StatusCode.OK


async def test_a_stream_that_stops_reading_delays_nobody(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, window_bytes=1 << 20).start()
    stub = stub_of(service)
    stuck = stub_of(service).WatchUsers(Request(earliest={}))
    unread = aiter(stuck)
    await anext(unread)
    large = {f"key-{n}": "v" * 250 for n in range(30)}
    reader = stub.WatchUsers(Request(now={}))
    live = aiter(reader)
    await anext(live)
    for _ in range(10):
        await asyncio.gather(*(stub.CreateUser(create(labels=large)) for _ in range(50)))
    positions = [event.position for message in await _events(live, 500) for event in message.events]
    assert positions == list(range(1, 501))
    reader.cancel()
    # It goes on where it stood, out of Postgres, and is told so.
    rest = await _events(unread, 500)
    assert [event.position for message in rest for event in message.events] == list(range(1, 501))
    stuck.cancel()


async def test_a_process_serves_on_after_its_streams_were_cancelled(service: ServiceProcess, stub: Stub) -> None:
    for _ in range(20):
        streams = [stub.WatchUsers(Request(earliest={})) for _ in range(10)]
        for stream in streams:
            await read(stream)
            stream.cancel()
    await stub.CreateUser(create())
    assert len(await replay(stub)) == 1
    assert not [record for record in service.records if record.get("level") == "error"]


async def test_a_stream_too_many_is_refused_until_another_ends(users_database: Database, services: Services) -> None:
    stub = stub_of(await services.users(users_database, max_streams=2).start())
    streams = [stub.WatchUsers(Request(now={})) for _ in range(2)]
    for stream in streams:
        await read(stream)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.WatchUsers(Request(now={})).read()
    said = refusal(caught.value)
    assert (said.code, said.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    retry_after = api_error(caught.value).retry_after
    assert retry_after is not None
    assert 2 <= retry_after <= 10
    streams[0].cancel()

    async def is_served() -> bool:
        stream = stub.WatchUsers(Request(now={}))
        try:
            await stream.read()
        except grpc.aio.AioRpcError:
            return False
        stream.cancel()
        return True

    await until(is_served)
    streams[1].cancel()
