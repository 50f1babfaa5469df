"""WatchUsers with a filter or a shard: what is selected, how a stream goes on where nothing is, what is refused."""

from __future__ import annotations

import asyncio
import random
import uuid
import zlib
from collections.abc import Callable, Sequence

import grpc.aio
import pytest

from servicekit import database
from tests.harness import Action, Database, PostgresProxy, Services, sql_contains
from tests.users.calls import (
    Log,
    Stub,
    create,
    events_of,
    follow,
    interval_passes,
    read,
    refusal,
    refused,
    replay,
    stub_of,
)
from tidings.users.v1 import users_pb2
from user_service import reads
from user_service.messages import Messages
from user_service.selection import Selection
from user_service.window import Window

Request = users_pb2.WatchUsersRequest
Event = users_pb2.UserEvent

HISTORY = "tidings-users-history"


async def _update(stub: Stub, user_id: str, **fields: object) -> users_pb2.User:
    return await stub.UpdateUser(
        users_pb2.UpdateUserRequest(
            user=users_pb2.User(id=user_id, **fields), update_mask={"paths": list(fields)}, request_id=str(uuid.uuid4())
        )
    )


async def _batch(stub: Stub, users: Sequence[dict[str, object]]) -> list[users_pb2.User]:
    requests = [create(**fields) for fields in users]
    answer = await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=requests))
    return list(answer.users)


async def _some_life(stub: Stub) -> list[str]:
    """Users of two teams who come, change, change sides, go and come back; returns their ids."""
    chance = random.Random(7)
    made = await _batch(stub, [{"labels": {"team": "red" if n % 2 else "blue", "n": str(n)}} for n in range(12)])
    ids = [user.id for user in made]
    for user_id in ids:
        for _ in range(3):
            labels = {"team": chance.choice(["red", "blue", "green"]), "n": str(chance.randrange(4))}
            await _update(stub, user_id, labels=labels)
        await _update(stub, user_id, display_name=f"Name {chance.random()}")
    for user_id in ids[:6]:
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=user_id))
    for user_id in ids[:3]:
        await stub.UndeleteUser(users_pb2.UndeleteUserRequest(id=user_id))
    return ids


def _shard(event: users_pb2.UserEvent, count: int) -> int:
    return _shard_of(event.user.id, count)


def _shard_of(user_id: str, count: int) -> int:
    return zlib.crc32(uuid.UUID(user_id).bytes) % count


_CASES: dict[str, tuple[Callable[[list[str]], dict[str, object]], Callable[[Event, list[str]], bool]]] = {
    "users": (lambda ids: {"filter": {"user_ids": ids[2:5]}}, lambda event, ids: event.user.id in ids[2:5]),
    "types": (
        lambda ids: {"filter": {"types": ["DELETED", "UNDELETED"]}},
        lambda event, ids: event.type in (Event.DELETED, Event.UNDELETED),
    ),
    "fields": (
        lambda ids: {"filter": {"changed_fields": ["display_name", "delete_time"]}},
        lambda event, ids: bool({"display_name", "delete_time"} & set(event.changed_fields)),
    ),
    "types and fields": (
        lambda ids: {"filter": {"types": ["UPDATED", "DELETED"], "changed_fields": ["labels", "delete_time"]}},
        lambda event, ids: (
            event.type == Event.DELETED or (event.type == Event.UPDATED and "labels" in event.changed_fields)
        ),
    ),
    # That of the first user, for another may hold nobody.
    "shard": (
        lambda ids: {"shard": {"index": _shard_of(ids[0], 3), "count": 3}},
        lambda event, ids: _shard(event, 3) == _shard_of(ids[0], 3),
    ),
    "users, types and shard": (
        lambda ids: {
            "filter": {"user_ids": ids, "types": ["CREATED"]},
            "shard": {"index": _shard_of(ids[0], 2), "count": 2},
        },
        lambda event, ids: (
            event.user.id in ids and event.type == Event.CREATED and _shard(event, 2) == _shard_of(ids[0], 2)
        ),
    ),
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("max_batch", [1, 1000])
async def test_what_is_selected(log: Log, case: str, max_batch: int) -> None:
    ids = await _some_life(log.stub)
    asked, model = _CASES[case]
    every = await log.events(include_previous=True)
    expected = [event for event in every if model(event, ids)]
    fields = asked(ids) | {"include_previous": True, "max_batch": max_batch}
    # A token of another selection is refused, so it begins with the log.
    found = [
        event for event in events_of(await follow(log.stub, earliest={}, **fields)) if event.position > log.position
    ]
    assert found == expected
    assert 0 < len(found) < len(every)


async def test_labels_select_users_who_matched_before_or_after(log: Log) -> None:
    await _some_life(log.stub)
    every = await log.events(include_previous=True)

    def matches(user: users_pb2.User) -> bool:
        return user.labels.get("team") == "red" and user.labels.get("n") == "1"

    expected = []
    for event in every:
        before, after = matches(event.previous), matches(event.user)
        if before or after:
            event.left_filter = not after
            expected.append(event)
    messages = await follow(log.stub, earliest={}, include_previous=True, filter={"labels": {"n": "1", "team": "red"}})
    found = [event for event in events_of(messages) if event.position > log.position]
    assert found == expected
    assert {event.left_filter for event in found} == {True, False}


async def test_a_user_enters_and_leaves_a_live_stream(log: Log) -> None:
    stub = log.stub
    tag = uuid.uuid4().hex
    stream = stub.WatchUsers(Request(now={}, filter={"labels": {"tag": tag}}))
    assert (await read(stream)).HasField("bookmark")
    assert (await read(stream)).HasField("caught_up")
    user = await stub.CreateUser(create())
    last = 0
    for labels, left in (({"tag": tag}, False), ({"tag": tag, "a": "b"}, False), ({"a": "b"}, True)):
        changed = await _update(stub, user.id, labels=labels)
        message = await read(stream)
        [event] = message.events
        assert (event.user, event.left_filter) == (changed, left)
        assert message.previous_position == (last or message.previous_position)
        last = message.position
    # It is no longer among them: neither of these is news.
    await _update(stub, user.id, labels={})
    await stub.DeleteUser(users_pb2.DeleteUserRequest(id=user.id))
    other = await stub.CreateUser(create(labels={"tag": tag}))
    message = await read(stream)
    assert [event.user for event in message.events] == [other]
    assert message.previous_position == last
    await stub.DeleteUser(users_pb2.DeleteUserRequest(id=other.id))
    [event] = (await read(stream)).events
    assert (event.type, event.left_filter) == (Event.DELETED, False)
    stream.cancel()


async def test_a_live_stream_without_news_is_silent_but_for_bookmarks(stub: Stub) -> None:
    user = await stub.CreateUser(create())
    asked: dict[str, object] = {"filter": {"user_ids": [user.id]}, "bookmark_interval": {"seconds": 1}}
    stream = stub.WatchUsers(Request(now={}, **asked))
    messages = [await read(stream), await read(stream)]
    assert [message.WhichOneof("mark") for message in messages] == ["bookmark", "caught_up"]
    for _ in range(20):
        await stub.CreateUser(create())
    while messages[-1].position < 21:
        messages.append(await read(stream))
        assert messages[-1].HasField("bookmark")
        assert not messages[-1].events
        assert messages[-1].previous_position == messages[-2].position
    resumed = stub.WatchUsers(Request(resume_token=messages[-1].resume_token, **asked))
    assert (await read(resumed)).position == 21
    assert (await read(resumed)).HasField("caught_up")
    changed = await _update(stub, user.id, display_name="Zoë")
    # Of a stream with news the messages go on from the last bookmark.
    for watching in (stream, resumed):
        while not (message := await read(watching)).events:
            assert message.position == 21
        assert [event.user for event in message.events] == [changed]
        assert (message.previous_position, message.position) == (21, 22)
        watching.cancel()


async def test_every_shard_together_is_the_log(log: Log) -> None:
    await _some_life(log.stub)
    every = await replay(log.stub)
    for count in (1, 2, 7):
        shards = [
            events_of(await follow(log.stub, earliest={}, shard={"index": index, "count": count}))
            for index in range(count)
        ]
        for index, shard in enumerate(shards):
            assert all(_shard(event, count) == index for event in shard)
            assert [event.position for event in shard] == sorted(event.position for event in shard)
        together = sorted((event for shard in shards for event in shard), key=lambda event: event.position)
        assert together == every


async def test_the_chain_holds_over_pages_without_anything_selected(
    services: Services, users_database: Database
) -> None:
    """Old events, of which few are selected: the first, some at the edges of pages, and none for thousands."""
    first = stub_of(await services.users(users_database).start())
    chosen = {1, 2, 700, 1000, 1001, 1999, 4100, 4102}
    position = 0
    # Groups of all sizes, so that pages and groups do not end together.
    for size in (1, 1, 898, 700, 1000, 999, 400, 102, 1, 1000):
        numbers = range(position + 1, position + size + 1)
        await _batch(first, [{"labels": {"chosen": "yes"} if number in chosen else {}} for number in numbers])
        position += size
    ends = {1, 2, 900, 1600, 2600, 3599, 3999, 4101, 4102, 5102}
    stub = stub_of(await services.users(users_database, page_cache_bytes=0).start())
    for max_batch in (1, 3, 1000):
        asked: dict[str, object] = {"filter": {"labels": {"chosen": "yes"}}, "max_batch": max_batch}
        messages = await follow(stub, earliest={}, **asked)
        assert [event.position for event in events_of(messages)] == sorted(chosen)
        assert messages[-1].position == 5102
        for message in messages:
            assert len(message.events) <= max_batch
            if message.resume_token:
                assert message.position in ends | {0}
                rest = events_of(await follow(stub, resume_token=message.resume_token, **asked))
                assert [event.position for event in rest] == sorted(n for n in chosen if n > message.position)


async def test_a_group_ends_with_a_token_though_its_last_events_are_not_selected(
    services: Services, users_database: Database
) -> None:
    first = stub_of(await services.users(users_database).start())
    for _ in range(3):
        await first.CreateUser(create())
    # One group over two pages, of which the beginning is selected; then nothing for a while.
    await _batch(first, [{"labels": {"chosen": "yes"} if number < 5 else {}} for number in range(999)])
    await _batch(first, [{} for _ in range(1000)])
    stub = stub_of(await services.users(users_database).start())
    for max_batch in (2, 1000):
        asked: dict[str, object] = {"filter": {"labels": {"chosen": "yes"}}, "max_batch": max_batch}
        messages = await follow(stub, earliest={}, **asked)
        sent = [message for message in messages if message.events]
        assert [event.position for event in events_of(sent)] == [4, 5, 6, 7, 8]
        assert not any(message.resume_token for message in sent)
        after = messages[messages.index(sent[-1]) + 1]
        # Not only with the next bookmark that is due, and after all of the group.
        assert after.HasField("bookmark")
        assert 1002 <= after.position <= 2002
        assert not events_of(await follow(stub, resume_token=after.resume_token, **asked))
        # Before it there was only the token of the start.
        assert [message.position for message in messages[: messages.index(after)] if message.resume_token] == [0]


async def test_tokens_are_offered_while_nothing_is_selected_of_thousands(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    first = stub_of(await services.users(users_database).start())
    for _ in range(6):
        await _batch(first, [{} for _ in range(1000)])
    stub = stub_of(await services.users(proxy.url(users_database)).start())
    page = sql_contains("user_events")
    fault = proxy.arm(HISTORY, Action.HOLD_BEFORE, page)
    asked: dict[str, object] = {
        "filter": {"user_ids": [str(uuid.UUID(int=1))]},
        "bookmark_interval": {"seconds": 1},
    }
    stream = stub.WatchUsers(Request(earliest={}, **asked))
    last = await read(stream)
    for number in range(1, 4):
        await fault.happened()
        await interval_passes(stub)
        following = proxy.arm(HISTORY, Action.HOLD_BEFORE, page)
        fault.release()
        fault = following
        message = await read(stream)
        assert message.HasField("bookmark")
        assert (message.previous_position, message.position) == (last.position, number * 1000)
        last = message
    fault.release()
    resumed = await follow(stub, resume_token=last.resume_token, **asked)
    assert not events_of(resumed)
    assert (resumed[0].position, resumed[-1].position) == (3000, 6000)
    stream.cancel()


async def test_selections_share_the_reads_of_old_events_and_what_is_built_of_them(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    stub = stub_of(await services.users(users_database).start())
    await _batch(stub, [{} for _ in range(300)])
    fault = proxy.arm("pages", Action.HOLD_BEFORE, sql_contains("user_events"), times=100)
    async with database.pool(proxy.url(users_database), "pages", size=4) as pool:
        async with pool.connection() as connection:
            state = await reads.feed_state(connection)
        window = Window(1 << 20)
        window.reset(state.head, state.head_time)
        messages = Messages(state.log_id, pool, window, readers=4, cache_bytes=1 << 20)
        selections = [Selection(shard_index=index, shard_count=2) for index in (0, 1, 0)]
        built = asyncio.gather(*(messages.after(0, selection, 1000, False) for selection in selections))
        await fault.happened()
        fault.release()
        even, odd, again = await built
        assert fault.hits == 1
        assert even is again
        assert await messages.after(0, selections[0], 1000, False) is even
        positions = [
            {event.position for event in users_pb2.WatchUsersResponse.FromString(message.data).events}
            for message in (even, odd)
        ]
        assert positions[0] | positions[1] == set(range(1, 301))
        assert not positions[0] & positions[1]


async def test_a_token_is_bound_to_what_is_selected(log: Log) -> None:
    stub = log.stub
    ids = [(await stub.CreateUser(create())).id for _ in range(3)]
    labels = {"a": "1", "b": "2"}
    asked: dict[str, object] = {
        "filter": {"user_ids": ids, "labels": labels, "types": ["CREATED", "UPDATED"], "changed_fields": ["email"]},
        "shard": {"index": 0, "count": 2},
    }

    async def token(**fields: object) -> str:
        stream = stub.WatchUsers(Request(now={}, **fields))
        first = await read(stream)
        stream.cancel()
        return first.resume_token

    async def is_taken(resume_token: str, **fields: object) -> bool:
        stream = stub.WatchUsers(Request(resume_token=resume_token, **fields))
        try:
            await read(stream)
        except grpc.aio.AioRpcError as error:
            said = refusal(error)
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert (said.reason, said.fields) == ("TOKEN_MISMATCH", ["resume_token"])
            return False
        stream.cancel()
        return True

    mine = await token(**asked)
    same: dict[str, object] = {
        "filter": {
            "user_ids": [ids[2], ids[0], ids[1].upper(), ids[0]],
            "labels": dict(reversed(labels.items())),
            "types": ["UPDATED", "CREATED", "UPDATED"],
            "changed_fields": ["email", "email"],
        },
        "shard": {"index": 0, "count": 2},
    }
    assert await is_taken(mine, **same)
    # What is not selected by is free to change.
    assert await is_taken(mine, **asked, include_previous=True, max_batch=3)
    others: list[dict[str, object]] = [
        {},
        {"filter": asked["filter"]},
        {"shard": asked["shard"]},
        {"filter": asked["filter"], "shard": {"index": 1, "count": 2}},
        {"filter": asked["filter"], "shard": {"index": 0, "count": 4}},
        {"filter": {"user_ids": ids[:2], "labels": labels, "types": ["CREATED"]}, "shard": asked["shard"]},
    ]
    for other in others:
        assert not await is_taken(mine, **other)
        assert not await is_taken(await token(**other), **asked)
    # All of these are everything.
    everything: list[dict[str, object]] = [{}, {"filter": {}}, {"shard": {"count": 1}}]
    for one in everything:
        for other in everything:
            assert await is_taken(await token(**one), **other)


_WRONG: dict[str, tuple[dict[str, object], list[str]]] = {
    "ids": ({"filter": {"user_ids": [str(uuid.uuid4()), "zoe", ""]}}, ["filter.user_ids[1]", "filter.user_ids[2]"]),
    "many wrong ids": ({"filter": {"user_ids": ["zoe"] * 5000}}, [f"filter.user_ids[{n}]" for n in range(10)]),
    "too many ids": ({"filter": {"user_ids": [str(uuid.uuid4())] * 10_001}}, ["filter.user_ids"]),
    "label keys": ({"filter": {"labels": {"": "x"}}}, ["filter.labels"]),
    "label values": ({"filter": {"labels": {"key": "x" * 257}}}, ["filter.labels.key"]),
    "too many labels": ({"filter": {"labels": {str(n): "" for n in range(33)}}}, ["filter.labels"]),
    "no type": ({"filter": {"types": ["TYPE_UNSPECIFIED"]}}, ["filter.types[0]"]),
    "types": ({"filter": {"types": ["CREATED", "SNAPSHOT", 77]}}, ["filter.types[1]", "filter.types[2]"]),
    "fields": (
        {"filter": {"changed_fields": ["email", "version", "nickname"]}},
        ["filter.changed_fields[1]", "filter.changed_fields[2]"],
    ),
    "too many choices": (
        {"filter": {"types": ["CREATED"] * 101, "changed_fields": ["email"] * 101}},
        ["filter.types", "filter.changed_fields"],
    ),
    "no shards": ({"shard": {"index": 0}}, ["shard.count"]),
    "shards": ({"shard": {"index": 0, "count": 65_537}}, ["shard.count"]),
    "shard": ({"shard": {"index": 2, "count": 2}}, ["shard.index"]),
    "several": (
        {"filter": {"user_ids": ["zoe"], "types": [0]}, "shard": {"index": 1, "count": 1}, "linger": {"seconds": 2}},
        ["linger", "shard.index", "filter.types[0]", "filter.user_ids[0]"],
    ),
}


@pytest.mark.parametrize("case", _WRONG)
async def test_a_wrong_selection_is_refused_and_its_fields_are_named(shared_stub: Stub, case: str) -> None:
    fields, wrong = _WRONG[case]
    said = await refused(shared_stub.WatchUsers(Request(earliest={}, **fields)).read())
    assert (said.code.name, said.reason, said.fields) == ("INVALID_ARGUMENT", "INVALID_FIELD", wrong)


async def test_the_largest_selections_are_served(shared_stub: Stub) -> None:
    user = await shared_stub.CreateUser(create(labels={"k" * 63: "v" * 256}))
    ids = [str(uuid.uuid4()) for _ in range(9_999)] + [user.id]
    fields = [name for name in users_pb2.User.DESCRIPTOR.fields_by_name if name not in _UNCHANGING]
    messages = await follow(
        shared_stub,
        earliest={},
        filter={
            "user_ids": ids,
            "labels": {"k" * 63: "v" * 256},
            "types": ["CREATED", "UPDATED", "DELETED", "UNDELETED"],
            "changed_fields": fields,
        },
        shard={"index": zlib.crc32(uuid.UUID(user.id).bytes) % 65_536, "count": 65_536},
    )
    assert [event.user for event in events_of(messages)] == [user]


_UNCHANGING = ("id", "version", "create_time", "update_time")
