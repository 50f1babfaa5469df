"""WatchUsers from a snapshot: what a client applies of it is what the table holds."""

from __future__ import annotations

import asyncio
import random
import signal
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from tests.harness import Action, Database, Databases, PostgresProxy, Services, sql_contains, until
from tests.users.calls import Stub, create, events_of, follow, interval_passes, read, refused, stub_of
from tidings.users.v1 import users_pb2
from user_service import tokens
from user_service.tokens import InSnapshot, ResumeToken

Request = users_pb2.WatchUsersRequest
Response = users_pb2.WatchUsersResponse
Event = users_pb2.UserEvent

HISTORY = "tidings-users-history"
_SECOND_PAGE = sql_contains("users.id >")  # and each after it


@dataclass
class Mirror:
    """A copy of the selected users, kept as the protocol tells clients to."""

    users: dict[str, users_pb2.User] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    begun: int = 0
    ended: int = 0
    position: int = 0
    token: str = ""

    def apply(self, message: users_pb2.WatchUsersResponse) -> None:
        """Takes a message."""
        if message.HasField("snapshot_begin"):
            self.named.clear()
            self.begun += 1
        for event in message.events:
            known = self.users.get(event.user.id)
            if event.type == Event.SNAPSHOT:
                assert event.user.id not in self.named, "named twice"
                self.named.add(event.user.id)
            if known is not None and known.version >= event.user.version:
                continue
            if event.type == Event.DELETED or event.left_filter:
                self.users.pop(event.user.id, None)
            else:
                self.users[event.user.id] = event.user
        if message.HasField("snapshot_end"):
            self.ended += 1
            self.users = {id_: user for id_, user in self.users.items() if id_ in self.named}
        self.position = message.position
        self.token = message.resume_token or self.token


async def _living(stub: Stub) -> dict[str, users_pb2.User]:
    """The table."""
    users: dict[str, users_pb2.User] = {}
    token = ""
    while True:
        page = await stub.ListUsers(users_pb2.ListUsersRequest(page_size=1000, page_token=token))
        users |= {user.id: user for user in page.users}
        token = page.next_page_token
        if not token:
            return users


async def _create(stub: Stub, count: int, **fields: object) -> list[users_pb2.User]:
    requests = [create(**fields) for _ in range(count)]
    answer = await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=requests))
    return list(answer.users)


async def _open(database: Database) -> list[tuple[object, ...]]:
    return await database.fetch("SELECT position FROM open_snapshots")


async def test_every_living_user_once_between_its_marks(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    stub = stub_of(await services.users(proxy.url(users_database)).start())
    made = await _create(stub, 300, display_name="Zoë", labels={"a": "b"})
    for user in made[:20]:
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=user.id))
    await stub.UndeleteUser(users_pb2.UndeleteUserRequest(id=made[0].id))
    living = await _living(stub)
    fault = proxy.arm(HISTORY, Action.HOLD_BEFORE, _SECOND_PAGE)
    stream = stub.WatchUsers(Request(snapshot={}, max_batch=7, include_previous=True))
    messages = [await read(stream), await read(stream)]
    assert [message.WhichOneof("mark") for message in messages] == ["bookmark", "snapshot_begin"]
    [[row]] = await users_database.fetch(
        "SELECT position = 321 AND expire_time BETWEEN now() + '59 min' AND now() + '1 h' FROM open_snapshots"
    )
    assert row
    fault.release()
    while not messages[-1].HasField("caught_up"):
        messages.append(await read(stream))
    stream.cancel()
    marks = [message.WhichOneof("mark") for message in messages if message.WhichOneof("mark")]
    assert marks == ["bookmark", "snapshot_begin", "snapshot_end", "caught_up"]
    assert all(message.previous_position == message.position == 321 for message in messages)
    assert all(message.resume_token for message in messages)
    assert (messages[1].snapshot_begin.position, messages[-2].snapshot_end.position) == (321, 321)
    assert max(len(message.events) for message in messages) == 7
    events = events_of(messages)
    assert {event.user.id: event.user for event in events} == living
    assert [event.user.id for event in events] == sorted(living)
    for event in events:
        assert event == Event(position=321, type=Event.SNAPSHOT, user=event.user, commit_time=event.user.update_time)
    assert await _open(users_database) == []


async def test_an_empty_table_has_an_empty_snapshot(stub: Stub) -> None:
    messages = await follow(stub, snapshot={})
    marks = [message.WhichOneof("mark") for message in messages]
    assert marks == ["bookmark", "snapshot_begin", "snapshot_end", "caught_up"]
    assert not events_of(messages)
    resumed = await follow(stub, resume_token=messages[-1].resume_token)
    assert [message.WhichOneof("mark") for message in resumed] == ["bookmark", "caught_up"]


async def test_messages_of_large_users_stay_below_a_mebibyte(stub: Stub) -> None:
    for _ in range(2):
        await _create(stub, 200, labels={f"key-{n}": "v" * 250 for n in range(30)})
    messages = await follow(stub, snapshot={})
    assert len(events_of(messages)) == 400
    assert all(message.ByteSize() < 1 << 20 for message in messages)


def _shard(user: users_pb2.User, count: int) -> int:
    return zlib.crc32(uuid.UUID(user.id).bytes) % count


async def test_a_snapshot_of_a_selection(stub: Stub) -> None:
    red, blue = await _create(stub, 400, labels={"team": "red"}), await _create(stub, 400, labels={"team": "blue"})
    chosen = [user.id for user in (*red[100:], *blue[:300])]
    await stub.DeleteUser(users_pb2.DeleteUserRequest(id=red[150].id))
    living = await _living(stub)
    cases: list[tuple[dict[str, object], Callable[[users_pb2.User], bool]]] = [
        ({"filter": {"labels": {"team": "red"}}}, lambda user: user.labels.get("team") == "red"),
        ({"filter": {"user_ids": [*chosen, str(uuid.uuid4())]}}, lambda user: user.id in chosen),
        ({"shard": {"index": 2, "count": 3}}, lambda user: _shard(user, 3) == 2),
        (
            {"filter": {"labels": {"team": "red"}, "user_ids": chosen}, "shard": {"index": 0, "count": 2}},
            lambda user: user.labels.get("team") == "red" and user.id in chosen and _shard(user, 2) == 0,
        ),
        ({"filter": {"labels": {"team": "green"}}}, lambda user: False),
    ]
    for asked, model in cases:
        events = events_of(await follow(stub, snapshot={}, **asked))
        assert [event.user for event in events] == [living[id_] for id_ in sorted(living) if model(living[id_])]


class _Writers:
    """Users come, change, go and come back, and change their label, until they are told to stop."""

    def __init__(self, stub: Stub, ids: list[str], seed: int) -> None:
        self._stub = stub
        self._ids = ids
        self._chance = random.Random(seed)
        self._stopping = False
        self.changes = 0

    async def run(self) -> None:
        """Makes one change after the other."""
        while not self._stopping:
            kind = self._chance.choice([self._create, self._label, self._label, self._delete, self._undelete])
            try:
                await kind()
            except grpc.aio.AioRpcError as error:
                # Deleted already, or not deleted: that is how it is drawn.
                if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
                    raise
            else:
                self.changes += 1

    def stop(self) -> None:
        """Ends after the change that is under way."""
        self._stopping = True

    async def _create(self) -> None:
        user = await self._stub.CreateUser(create(labels={"team": self._chance.choice(["red", "blue"])}))
        self._ids.append(user.id)

    async def _label(self) -> None:
        user = users_pb2.User(id=self._one(), labels={"team": self._chance.choice(["red", "blue"])})
        await self._stub.UpdateUser(users_pb2.UpdateUserRequest(user=user, update_mask={"paths": ["labels"]}))

    async def _delete(self) -> None:
        await self._stub.DeleteUser(users_pb2.DeleteUserRequest(id=self._one()))

    async def _undelete(self) -> None:
        await self._stub.UndeleteUser(users_pb2.UndeleteUserRequest(id=self._one()))

    def _one(self) -> str:
        return self._chance.choice(self._ids)


async def _mirror(stubs: list[Stub], asked: dict[str, object], seed: int, head: asyncio.Future[int]) -> Mirror:
    """A client of a snapshot and what follows it, up to the head when that is known. It breaks off after some messages
    and goes on at another replica.
    """
    chance, mirror = random.Random(seed), Mirror()
    while True:
        start: dict[str, object] = {"resume_token": mirror.token} if mirror.token else {"snapshot": {}}
        stream = chance.choice(stubs).WatchUsers(Request(**start, max_batch=20, **asked))
        patience = chance.randrange(2, 30)
        async for message in stream:
            mirror.apply(message)
            patience -= 1
            # Without a token there is nowhere else to go on.
            if message.resume_token and patience <= 0:
                break
            if head.done() and mirror.ended and message.position >= head.result():
                stream.cancel()
                return mirror
        stream.cancel()


async def test_mirrors_of_a_table_that_changes_are_the_table(services: Services, users_database: Database) -> None:
    stubs = [stub_of(await services.users(users_database).start()) for _ in range(2)]
    users = [*await _create(stubs[0], 600, labels={"team": "red"}), *await _create(stubs[0], 600)]
    ids = [user.id for user in users]
    few = random.Random(3).sample(ids, 500)
    selections: list[tuple[dict[str, object], Callable[[users_pb2.User], bool]]] = [
        ({}, lambda user: True),
        ({"filter": {"labels": {"team": "red"}}}, lambda user: user.labels.get("team") == "red"),
        ({"filter": {"user_ids": few}}, lambda user: user.id in few),
        ({"shard": {"index": 1, "count": 2}}, lambda user: _shard(user, 2) == 1),
        (
            {"filter": {"labels": {"team": "blue"}}, "shard": {"index": 0, "count": 2}},
            lambda user: user.labels.get("team") == "blue" and _shard(user, 2) == 0,
        ),
    ]
    writers = [_Writers(stubs[number % 2], ids, number) for number in range(6)]
    head: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        writing = [group.create_task(writer.run()) for writer in writers]
        mirrors = [
            group.create_task(_mirror(stubs, asked | {"bookmark_interval": {"seconds": 1}}, number, head))
            for number, (asked, _) in enumerate(selections * 2)
        ]
        # Changes before, during and after the snapshots.
        feed = await stubs[0].GetFeed(users_pb2.GetFeedRequest())
        goal = feed.head_position + 1500

        async def is_busy() -> bool:
            return (await stubs[0].GetFeed(users_pb2.GetFeedRequest())).head_position >= goal

        await until(is_busy, timeout=60)
        for writer in writers:
            writer.stop()
        await asyncio.gather(*writing)
        head.set_result((await stubs[0].GetFeed(users_pb2.GetFeedRequest())).head_position)
    living = await _living(stubs[0])
    for task, (_, model) in zip(mirrors, selections * 2, strict=True):
        mirror = task.result()
        assert mirror.users == {id_: user for id_, user in living.items() if model(user)}
        assert mirror.ended == 1


async def test_a_snapshot_is_resumed_after_any_message_at_any_replica(
    services: Services, users_database: Database
) -> None:
    stubs = [stub_of(await services.users(users_database).start()) for _ in range(2)]
    await _create(stubs[0], 600)
    whole = await follow(stubs[0], snapshot={}, max_batch=60)
    everybody = [event.user for event in events_of(whole)]
    assert len(everybody) == 600
    passed = 0
    for message in whole:
        passed += len(message.events)
        rest = await follow(stubs[1], resume_token=message.resume_token, max_batch=100)
        assert [event.user for event in events_of(rest)] == everybody[passed:]
        marks = [one.WhichOneof("mark") for one in rest if one.WhichOneof("mark")]
        begins = ["snapshot_begin"] if not passed else []
        ended = message.HasField("snapshot_end") or message.HasField("caught_up")
        assert marks == ["bookmark", *([] if ended else [*begins, "snapshot_end"]), "caught_up"]
    # What changed in between comes afterwards.
    late = await stubs[0].CreateUser(create())
    rest = await follow(stubs[1], resume_token=whole[3].resume_token)
    assert events_of(rest)[-1].user == late
    assert events_of(rest)[-1].type == Event.CREATED


async def test_a_drain_in_the_middle_of_a_snapshot(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database)).start()
    stub = stub_of(service)
    everybody = sorted(user.id for user in await _create(stub, 1000))
    fault = proxy.arm(HISTORY, Action.HOLD_BEFORE, _SECOND_PAGE)
    stream = stub.WatchUsers(Request(snapshot={}))
    mirror, unread = Mirror(), aiter(stream)
    for _ in range(3):
        mirror.apply(await anext(unread))
    await fault.happened()
    service.send(signal.SIGTERM)
    await service.wait_log("stopping")
    fault.release()
    rest = [message async for message in unread]
    for message in rest:
        mirror.apply(message)
    assert [message.WhichOneof("mark") for message in rest][-2:] == ["bookmark", "drain"]
    assert await stream.code() is grpc.StatusCode.OK
    assert await service.wait() == 0
    assert 0 < len(mirror.named) < 1000
    assert await _open(users_database) == [(1000,)]
    await service.restart()
    for message in await follow(stub_of(service), resume_token=mirror.token):
        mirror.apply(message)
    assert sorted(mirror.named) == everybody
    assert (mirror.begun, mirror.ended) == (1, 1)
    assert await _open(users_database) == []


async def test_an_old_stream_ends_inside_its_snapshot(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database), max_stream_age=1).start()
    stub = stub_of(service)
    everybody = sorted(user.id for user in await _create(stub, 600))
    fault = proxy.arm(HISTORY, Action.HOLD_BEFORE, _SECOND_PAGE)
    stream = stub.WatchUsers(Request(snapshot={}))
    mirror, unread = Mirror(), aiter(stream)
    for _ in range(3):
        mirror.apply(await anext(unread))
    await fault.happened()
    # A stream gets 0.8 to 1.2 s old: after two others, one after the other, this one is.
    for _ in range(2):
        async for _message in stub.WatchUsers(Request(now={})):
            pass
    fault.release()
    rest = [message async for message in unread]
    for message in rest:
        mirror.apply(message)
    assert rest[-1].HasField("drain")
    assert mirror.ended == 0
    while not mirror.ended:
        async for message in stub.WatchUsers(Request(resume_token=mirror.token)):
            mirror.apply(message)
    assert sorted(mirror.named) == everybody
    assert mirror.begun == 1


async def test_a_snapshot_of_which_nobody_is_selected_offers_tokens(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database)).start()
    stub = stub_of(service)
    for _ in range(2):
        await _create(stub, 600)
    asked: dict[str, object] = {"filter": {"labels": {"team": "red"}}, "bookmark_interval": {"seconds": 1}}
    page = _SECOND_PAGE
    fault = proxy.arm(HISTORY, Action.HOLD_BEFORE, page)
    stream = stub.WatchUsers(Request(snapshot={}, **asked))
    seen = {(await read(stream)).resume_token}
    assert (await read(stream)).HasField("snapshot_begin")
    for _ in range(3):
        await fault.happened()
        await interval_passes(stub)
        following = proxy.arm(HISTORY, Action.HOLD_BEFORE, page)
        fault.release()
        fault = following
        message = await read(stream)
        assert message.HasField("bookmark")
        assert (message.previous_position, message.position) == (1200, 1200)
        assert message.resume_token not in seen
        seen.add(message.resume_token)
    fault.release()
    fault.disarm()
    resumed = await follow(stub, resume_token=message.resume_token, **asked)
    # Its client knows that the snapshot has begun.
    assert [one.WhichOneof("mark") for one in resumed] == ["bookmark", "snapshot_end", "caught_up"]
    stream.cancel()


async def test_events_cannot_be_chosen_from_a_snapshot(stub: Stub) -> None:
    await _create(stub, 3)
    stream = stub.WatchUsers(Request(snapshot={}))
    inside = (await read(stream)).resume_token
    stream.cancel()
    starts: list[dict[str, object]] = [{"snapshot": {}}, {"resume_token": inside}]
    for start in starts:
        said = await refused(
            stub.WatchUsers(Request(filter={"types": ["CREATED"], "changed_fields": ["email"]}, **start)).read()
        )
        assert (said.code, said.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert said.fields == ["filter.types", "filter.changed_fields"]
    said = await refused(stub.WatchUsers(Request(resume_token=inside, shard={"count": 2})).read())
    assert (said.code, said.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_MISMATCH")


async def _inside(stub: Stub) -> str:
    """A token from the middle of a snapshot."""
    stream = stub.WatchUsers(Request(snapshot={}, max_batch=1))
    for _ in range(3):
        message = await read(stream)
    stream.cancel()
    assert message.events
    return message.resume_token


async def test_tokens_of_a_snapshot_are_refused_like_others(services: Services, databases: Databases) -> None:
    ours, theirs = await databases.users(), await databases.users()
    service = await services.users(ours).start()
    here, there = stub_of(service), stub_of(await services.users(theirs).start())
    for stub in (here, there):
        await _create(stub, 5)
        await _create(stub, 5)

    async def reason(stub: Stub, token: str) -> tuple[grpc.StatusCode, str, dict[str, str]]:
        said = await refused(stub.WatchUsers(Request(resume_token=token)).read())
        return said.code, said.reason, said.metadata

    code, why, metadata = await reason(here, await _inside(there))
    assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "FOREIGN_TOKEN")
    assert metadata["advice"] == "start with snapshot"
    inside = await _inside(here)
    for broken in (inside[:-4], inside + "AAAA"):
        assert (await reason(here, broken))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_TOKEN")
    await _create(here, 5)
    assert await service.stop() == 0
    await ours.fetch("DELETE FROM user_events WHERE position <= 12")
    await ours.fetch("UPDATE feed SET earliest_position = 13")
    await service.restart()
    code, why, metadata = await reason(stub_of(service), inside)
    assert (code, why) == (grpc.StatusCode.OUT_OF_RANGE, "POSITION_EXPIRED")
    assert metadata["earliest_position"] == "13"


async def test_a_snapshot_whose_events_are_removed_before_it_is_known_begins_again(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    stub = stub_of(await services.users(proxy.url(users_database)).start())
    await _create(stub, 5)
    users = proxy.arm(HISTORY, Action.HOLD_BEFORE, sql_contains("FROM users"))
    fault = proxy.arm("tidings-users-queries", Action.HOLD_AFTER, sql_contains("INSERT INTO open_snapshots"))
    stream = stub.WatchUsers(Request(snapshot={}))
    opening = asyncio.ensure_future(read(stream))
    await fault.happened()
    assert await _open(users_database) == [(5,)]
    await _create(stub, 5)
    await users_database.fetch("DELETE FROM user_events WHERE position <= 7")
    await users_database.fetch("UPDATE feed SET earliest_position = 8")
    fault.release()
    assert (await opening).position == 10
    assert await _open(users_database) == [(10,)]
    users.release()
    while not (message := await read(stream)).HasField("snapshot_end"):
        assert message.position == 10
    stream.cancel()


async def test_snapshots_that_broke_off_are_forgotten_once_they_have_expired(
    services: Services, users_database: Database
) -> None:
    await users_database.fetch(
        "INSERT INTO open_snapshots VALUES (gen_random_uuid(), 1, now() - interval '1 s'),"
        " (gen_random_uuid(), 2, now() + interval '1 h')"
    )
    await services.users(users_database).start()
    while (1,) in (left := await _open(users_database)):
        await asyncio.sleep(0.05)
    assert left == [(2,)]


async def test_a_snapshot_whose_row_is_gone_goes_on_while_what_follows_it_is_retained(
    stub: Stub, users_database: Database
) -> None:
    await _create(stub, 5)
    inside = await _inside(stub)
    await users_database.fetch("DELETE FROM open_snapshots")
    assert len(events_of(await follow(stub, resume_token=inside))) == 4


async def test_people_with_the_lowest_id_are_in_the_snapshot(stub: Stub, users_database: Database) -> None:
    """Ids of users from before the feed need not be of the service's making."""
    await _create(stub, 2)
    await users_database.fetch(
        "INSERT INTO users (id, username, email, email_key, create_time, update_time)"
        " VALUES (%s, 'first', 'first@example.com', 'first@example.com', now(), now())",
        uuid.UUID(int=0),
    )
    users = [event.user.username for event in events_of(await follow(stub, snapshot={}))]
    assert len(users) == 3
    assert users[0] == "first"


@pytest.mark.parametrize(
    ("snapshot", "size"),
    [(None, 41), (InSnapshot(uuid.UUID(int=5)), 57), (InSnapshot(uuid.UUID(int=5), bytes(16)), 73)],
)
def test_a_token_is_read_as_it_was_made(snapshot: InSnapshot | None, size: int) -> None:
    token = ResumeToken(uuid.UUID(int=7), 12, tokens.event_hash(b"event"), b"selected", snapshot)
    text = tokens.encode(token)
    assert len(text) == -(-size * 8 // 6)
    assert tokens.decode(text) == token


def test_tokens_of_streams_without_a_snapshot_stay_what_they_are() -> None:
    text = "AQAAAAAAAAAAAAAAAAAAAAcAAAAAAAAADCOeaNOSeQ9XAAAAAAAAAAA"
    found: Any = tokens.decode(text)
    assert found == ResumeToken(uuid.UUID(int=7), 12, bytes.fromhex("239e68d392790f57"))
    assert tokens.encode(found) == text
