"""Sealing: what is packed comes back the same, and nobody who reads or writes notices when it happens."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servicekit import arrays, database
from servicekit.database import Connection
from tests.harness import Action, Database, PostgresProxy, PostgresServer, Services, sql_contains, until
from tests.users.calls import Stub, create, read, replay, stub_of
from tidings.users.v1 import users_pb2
from user_service import reads, sealer
from user_service.events import LARGEST_MESSAGE, Entry, shard_hash
from user_service.sealer import Loose, Rules

SEALER = "tidings-users-sealer"
_NOW = datetime(2030, 1, 1, tzinfo=UTC)
_DAY = timedelta(days=1)

_INSERT = """
    INSERT INTO user_events (position, event_id, group_end, commit_time, element, previous, user_id, type,
        changed_fields, shard_hash)
    SELECT * FROM unnest(%s::bigint[], %s::uuid[], %s::boolean[], %s::timestamptz[], %s::bytea[], %s::bytea[],
        %s::uuid[], %s::smallint[], %s::integer[], %s::bigint[])
"""


async def _store(connection: Connection, entries: Sequence[Entry]) -> None:
    """Makes these the log."""
    await connection.execute("TRUNCATE user_events, segments")
    positions, ids, ends, times, elements, previous, users, types, fields = zip(*entries, strict=True)
    columns = [
        arrays.bigints(positions), arrays.ids(ids), arrays.booleans(ends), arrays.times(times),
        arrays.byteas(elements), arrays.byteas(previous), arrays.ids(users), arrays.smallints(types),
        arrays.integers(fields), arrays.bigints([shard_hash(one) for one in users]),
    ]  # fmt: skip
    await connection.execute(_INSERT, columns)
    await connection.execute("UPDATE feed SET head_position = %s, head_time = %s", (positions[-1], times[-1]))


async def _seal_all(connection: Connection, rules: Rules) -> int:
    count = 0
    while await sealer.seal(connection, rules):
        count += 1
    return count


_EVENTS = st.tuples(
    st.uuids().map(lambda one: one.bytes),
    st.booleans(),
    st.timedeltas(timedelta(0), timedelta(hours=7)),
    st.binary(max_size=40),
    st.none() | st.binary(max_size=40),
    st.uuids().map(lambda one: one.bytes),
    st.integers(-(2**15), 2**15 - 1),
    st.integers(-(2**31), 2**31 - 1),
)


def _log(parts: Sequence[tuple[bytes, bool, timedelta, bytes, bytes | None, bytes, int, int]]) -> list[Entry]:
    time, entries = datetime(2020, 1, 1, tzinfo=UTC), []
    for position, (event_id, ends, later, *rest) in enumerate(parts, 1):
        time += later
        entries.append(Entry(position, event_id, ends or position == len(parts), time, *rest))
    return entries


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(_EVENTS, min_size=1, max_size=12), size=st.integers(1, 8))
async def test_what_is_sealed_reads_the_same(
    shared_database: Database,
    parts: list[tuple[bytes, bool, timedelta, bytes, bytes | None, bytes, int, int]],
    size: int,
) -> None:
    entries, head, rules = _log(parts), len(parts), Rules(size, 0, _DAY)
    async with await database.connect(shared_database.url, "test") as connection:
        await _store(connection, entries)
        for stage in range(3):
            for after in range(head):
                assert await reads.events(connection, after, head) == entries[after:]
                assert await reads.events(connection, after, after + 2) == entries[after : after + 2]
                page = await reads.page(connection, after, min(after + 3, head))
                assert page is not None
                assert (page.after, page.entries()) == (after, entries[after : page.position])
                assert page.elements == b"".join(entry.element for entry in page.entries())
                last = entries[page.position - 1]
                assert (page.event_id, page.group_end) == (last.event_id, last.group_end)
                assert await reads.event_id(connection, after + 1) == entries[after].event_id
                assert await reads.commit_time(connection, after + 1) == entries[after].commit_time
            assert await reads.events(connection, head, head + 10) == []
            assert await reads.page(connection, head, head + 1) is None
            assert await reads.event_id(connection, head + 1) is None
            state = await reads.feed_state(connection)
            for entry in entries:
                first = next(other for other in entries if other.commit_time >= entry.commit_time)
                assert await reads.first_since(connection, entry.commit_time, state) == first.position
            # Once with nothing sealed, once with a segment, once with all.
            if stage == 0:
                assert await sealer.seal(connection, rules)
            else:
                await _seal_all(connection, rules)
        assert await shared_database.fetch("SELECT count(*) FROM user_events") == [(0,)]


_LOOSE = st.lists(
    st.tuples(
        st.booleans(),
        st.timedeltas(timedelta(0), timedelta(hours=9)),
        st.integers(1, LARGEST_MESSAGE // 3),
        st.integers(0, LARGEST_MESSAGE // 3),
    ),
    min_size=1,
    max_size=30,
)


@given(_LOOSE, st.integers(1, 10), st.integers(0, 30), st.timedeltas(timedelta(0), 30 * _DAY))
def test_where_a_segment_ends(
    parts: list[tuple[bool, timedelta, int, int]], size: int, unsealed: int, age: timedelta
) -> None:
    time, loose = _NOW - age, []
    for position, (ends, later, element, previous) in enumerate(parts, 101):
        time += later
        loose.append(Loose(position, ends, time, element, previous))
    head = loose[-1].position
    last = sealer.cut(loose, Rules(size, unsealed, _DAY), head, _NOW)
    if last is None:
        return
    assert loose[0].commit_time + _DAY < _NOW or last <= head - unsealed
    inside = loose[: last - 100]
    assert inside[-1].group_end
    if any(one.group_end for one in inside[:-1]):
        assert len(inside) <= size
        assert sum(one.element for one in inside) <= LARGEST_MESSAGE
        assert sum(one.previous for one in inside) <= LARGEST_MESSAGE
        assert inside[-1].commit_time <= inside[0].commit_time + _DAY


_LARGE = LARGEST_MESSAGE // 2 + 1


# Of each event: whether a group ends there, its age in hours, the bytes of its element and of the user before.
@pytest.mark.parametrize(
    ("given", "size", "unsealed", "last"),
    [
        ([(True, 1, 9, 9)] * 3, 4, 0, None),
        ([(True, 1, 9, 9)] * 3, 3, 0, 3),
        ([(True, 1, 9, 9)] * 3, 3, 1, None),
        ([(True, 1, 9, 9)] * 3, 2, 1, 2),
        ([(True, 25, 9, 9)] * 3, 9, 9, 3),
        ([(True, 49, 9, 9), (True, 26, 9, 9), (True, 24, 9, 9)], 9, 9, 2),
        ([(True, 49, 9, 9), (True, 25, 9, 9), (True, 25, 9, 9)], 1, 9, 1),
        ([(True, 1, 9, 9), (False, 1, 9, 9), (True, 1, 9, 9)], 2, 0, 1),
        ([(False, 1, 9, 9), (False, 1, 9, 9), (True, 1, 9, 9), (True, 1, 9, 9)], 2, 0, 3),
        ([(False, 49, 9, 9), (False, 49, 9, 9)], 1, 0, None),
        ([(True, 1, _LARGE, 9), (True, 1, _LARGE, 9)], 9, 0, 1),
        ([(True, 1, 9, _LARGE), (True, 1, 9, _LARGE)], 9, 0, 1),
        ([(False, 1, _LARGE, 9), (True, 1, _LARGE, 9), (True, 1, 9, 9)], 9, 0, 2),
    ],
    ids=["few", "full", "near", "far", "old", "span", "old and full", "group", "large group", "part of a group",
         "elements", "previous", "large element"],
)  # fmt: skip
def test_when_a_segment_is_due(
    given: list[tuple[bool, int, int, int]], size: int, unsealed: int, last: int | None
) -> None:
    loose = [
        Loose(position, ends, _NOW - timedelta(hours=age), element, previous)
        for position, (ends, age, element, previous) in enumerate(given, 1)
    ]
    assert sealer.cut(loose, Rules(size, unsealed, _DAY), len(loose), _NOW) == last


async def test_a_hole_is_not_sealed_over(users_database: Database) -> None:
    parts = [(bytes(16), True, timedelta(0), b"element", None, bytes(16), 1, 0)] * 9
    async with await database.connect(users_database.url, "test") as connection:
        await _store(connection, _log(parts))
        await connection.execute("DELETE FROM user_events WHERE position = 6")
        assert await _seal_all(connection, Rules(4, 0, _DAY)) == 1
        assert await reads.page(connection, 4, 9) is None
    assert await users_database.fetch("SELECT first_position, last_position FROM segments") == [(1, 4)]
    assert await users_database.fetch("SELECT count(*) FROM user_events") == [(4,)]


async def _change_users(stub: Stub, count: int, **fields: object) -> None:
    """Creations, updates, a deletion and an undeletion, and groups between them."""
    for number in range(count):
        one = await stub.CreateUser(create(**fields))
        mask = {"paths": ["display_name"]}
        await stub.UpdateUser(
            users_pb2.UpdateUserRequest(user={"id": one.id, "display_name": f"Zoë {number}"}, update_mask=mask)
        )
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=one.id))
        await stub.UndeleteUser(users_pb2.UndeleteUserRequest(id=one.id))
        group = [create(**fields) for _ in range(3)]
        await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=group))


async def _tokens(stub: Stub) -> list[str]:
    """A token of every place where one may stand."""
    stream, tokens = stub.WatchUsers(users_pb2.WatchUsersRequest(earliest={}, max_batch=1)), []
    async for message in stream:
        if message.HasField("caught_up"):
            break
        if message.resume_token:
            tokens.append(message.resume_token)
    stream.cancel()
    return tokens


async def _all_is_sealed(made: Database) -> bool:
    return await made.fetch("SELECT count(*) FROM user_events") == [(0,)]


# How a service seals all that there is, at once and into tiny segments.
TINY = {"segment_events": 5, "segment_span": 0.05, "unsealed_events": 0, "seal_interval": 0.05, "page_cache_bytes": 0}


async def test_streams_are_the_same_once_events_are_sealed(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    await _change_users(stub_of(service), 6)
    tokens = await _tokens(stub_of(service))
    assert len(tokens) == 1 + 6 * 5
    starts: list[dict[str, object]] = [{"earliest": {}}]
    starts += [{"resume_token": token} for token in tokens]
    starts += [{"since": event.commit_time} for event in await replay(stub_of(service))]

    async def streams() -> list[list[users_pb2.UserEvent]]:
        stub = stub_of(service)
        found = [await _events(stub, **start) for start in starts]
        found += [await _events(stub, earliest={}, include_previous=True, max_batch=size) for size in (1, 4, 1000)]
        return found

    before = await streams()
    await service.stop()
    service = await services.users(users_database, **TINY).start()
    await until(lambda: _all_is_sealed(users_database))
    # After its start its window is empty: all comes from segments.
    await service.stop()
    await service.restart()
    assert await streams() == before
    assert await _tokens(stub_of(service)) == tokens
    assert await stub_of(service).CreateUser(create())
    assert [event.position for event in await replay(stub_of(service))] == list(range(1, 44))

    # Each group of three is the last of the seven events of a round.
    edges = [last for (last,) in await users_database.fetch("SELECT last_position FROM segments")]
    assert all(last % 7 not in (5, 6) for last in edges if isinstance(last, int))
    [checked] = await users_database.fetch(
        "SELECT bool_and(octet_length(elements) + octet_length(previous) + octet_length(records) = size),"
        " bool_and(first_time <= last_time), min(first_position) FROM segments"
    )
    assert checked == (True, True, 1)


async def _events(stub: Stub, **request: object) -> list[users_pb2.UserEvent]:
    """All events of a stream up to the head."""
    stream = stub.WatchUsers(users_pb2.WatchUsersRequest(**request))
    events: list[users_pb2.UserEvent] = []
    while not (message := await read(stream)).HasField("caught_up"):
        events += message.events
    stream.cancel()
    return events


async def test_readers_and_writers_notice_nothing(services: Services, users_database: Database) -> None:
    settings = {**TINY, "window_bytes": 1 << 20}
    replicas = [await services.users(users_database, **settings).start() for _ in range(2)]
    stubs = [stub_of(replica) for replica in replicas]
    live = [stub.WatchUsers(users_pb2.WatchUsersRequest(earliest={})) for stub in stubs]
    large = {f"key-{n}": "v" * 250 for n in range(12)}
    writing = True

    async def read_again_and_again(stub: Stub) -> None:
        rounds = 0
        while writing or rounds < 2:
            # It asserts that nothing is missing and nothing comes twice.
            await replay(stub, max_batch=50 - rounds * 7 % 50)
            rounds += 1

    readers = [asyncio.create_task(read_again_and_again(stub)) for stub in stubs]
    await asyncio.gather(*(_change_users(stubs[number % 2], 15, labels=large) for number in range(8)))
    writing = False
    await asyncio.gather(*readers)
    await until(lambda: _all_is_sealed(users_database))
    everything = await replay(stubs[0])
    assert len(everything) == 8 * 15 * 7
    assert await replay(stubs[1]) == everything
    for stream in live:
        seen: list[users_pb2.UserEvent] = []
        while len(seen) < len(everything):
            seen += (await read(stream)).events
        stream.cancel()
        assert seen == everything
    assert not [record for replica in replicas for record in replica.records if record.get("level") == "error"]


@pytest.mark.parametrize("action", [Action.HOLD_BEFORE, Action.HOLD_AFTER])
async def test_kill_9_in_the_middle_of_sealing_leaves_a_whole_log(
    services: Services, users_database: Database, proxy: PostgresProxy, action: Action
) -> None:
    fault = proxy.arm(SEALER, action, sql_contains("INSERT INTO segments"))
    doomed = await services.users(proxy.url(users_database), **TINY).start()
    await _change_users(stub_of(doomed), 2)
    await fault.happened()
    await doomed.kill()
    fault.release()
    assert await users_database.fetch("SELECT count(*), (SELECT count(*) FROM segments) FROM user_events") == [(14, 0)]
    other = stub_of(await services.users(users_database, **TINY).start())
    await until(lambda: _all_is_sealed(users_database))
    assert len(await replay(other)) == 14


async def test_one_replica_seals_at_a_time(
    services: Services, users_database: Database, proxy: PostgresProxy, postgres: PostgresServer
) -> None:
    stub = stub_of(await services.users(users_database).start())
    await _change_users(stub, 2)
    # It has the lock, and does not hear what there is to seal before it is paused.
    held = proxy.arm(SEALER, Action.HOLD_AFTER, sql_contains("octet_length(user_events.element)"))
    paused = await services.users(proxy.url(users_database), **TINY).start()
    await held.happened()
    paused.send(signal.SIGSTOP)
    async with PostgresProxy(postgres.server.socket_dir) as others:
        # These let everything pass and count.
        asks = others.arm(SEALER, Action.HOLD_BEFORE, sql_contains("pg_try_advisory_xact_lock"), times=10**6)
        seals = others.arm(SEALER, Action.HOLD_BEFORE, sql_contains("INSERT INTO segments"), times=10**6)
        asks.release()
        seals.release()
        await services.users(others.url(users_database), **TINY).start()
        await asks.happened(3)
        # Postgres ends the paused session, for it is idle in its transaction; then the other takes over.
        await until(lambda: _all_is_sealed(users_database))
        assert seals.hits > 0
        held.release()
        paused.send(signal.SIGCONT)
        await paused.wait_log("sealing is put off")
        await _change_users(stub_of(paused), 1)
        await until(lambda: _all_is_sealed(users_database))
    assert len(await replay(stub)) == 21
    assert await users_database.fetch("SELECT sum(last_position - first_position + 1) FROM segments") == [(21,)]
