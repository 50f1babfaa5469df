"""A client that shares no code with the service sees what the protocol promises. It checks the chain of positions and
its shard by itself, and ends with an error if one does not hold.
"""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
import zlib
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from tests.harness import Database, Databases, Services, until
from tests.js.conftest import Client
from tests.js.printed import (
    Printed,
    caught_up,
    events_of,
    marks_of,
    messages_of,
    passed,
    positions_of,
    refusal,
    told,
    wait_printed,
)
from tests.users.calls import Stub, create, replay, stub_of
from tidings.users.v1 import users_pb2

_VECTORS = Path(__file__).parents[1] / "vectors" / "shard_hash.json"


def _fields(user: dict[str, Any]) -> dict[str, Any]:
    """What protobuf's JSON and the client's write alike: all but times."""
    return {name: value for name, value in user.items() if not name.endswith("_time")}


def _as_json(user: users_pb2.User) -> dict[str, Any]:
    written: dict[str, Any] = MessageToDict(
        user, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _fields(written)


def _group(size: int, **fields: object) -> users_pb2.BatchCreateUsersRequest:
    return users_pb2.BatchCreateUsersRequest(requests=[create(**fields) for _ in range(size)])


async def _changes(stub: Stub, rounds: int) -> None:
    """Five events a round: a group of three, a change, a deletion."""
    for _ in range(rounds):
        made = (await stub.BatchCreateUsers(_group(3))).users
        changed = users_pb2.User(id=made[0].id, display_name="Zoë Ångström", labels={"team": "a"})
        request_id = str(uuid.uuid4())
        await stub.UpdateUser(
            users_pb2.UpdateUserRequest(
                user=changed, update_mask={"paths": ["display_name", "labels"]}, request_id=request_id
            )
        )
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=made[1].id, request_id=request_id))


def _shard(user: users_pb2.User) -> int:
    return zlib.crc32(uuid.UUID(user.id).bytes) % 3


async def _head(stub: Stub) -> int:
    return (await stub.GetFeed(users_pb2.GetFeedRequest())).head_position


async def _living(stub: Stub) -> list[users_pb2.User]:
    users: list[users_pb2.User] = []
    page = users_pb2.ListUsersResponse(next_page_token="")
    while not users or page.next_page_token:
        page = await stub.ListUsers(users_pb2.ListUsersRequest(page_size=1000, page_token=page.next_page_token))
        users += page.users
    return users


async def test_the_shard_hash_has_the_vectors_of_every_language(client: Client) -> None:
    vectors = json.loads(_VECTORS.read_text())["vectors"]
    counts = ",".join(vectors[0]["index"])
    hashing = client("hash", "--counts", counts, *(vector["id"] for vector in vectors))
    await hashing.launch()
    assert await hashing.wait() == 0, hashing.tail()
    assert [
        {name: record[name] for name in vector} for record, vector in zip(hashing.records, vectors, strict=True)
    ] == (vectors)


async def test_everything_from_the_earliest(client: Client, services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    await _changes(stub, 2)
    group = (await stub.BatchCreateUsers(_group(50, labels={"Ä": "ö"}, locale="de-CH"))).users
    watcher = client("watch", "--address", service.address, "--max-batch", "7")
    await watcher.launch()
    messages = await wait_printed(watcher, caught_up)
    later = await stub.CreateUser(create())
    messages = await wait_printed(watcher, passed(61))
    assert marks_of(messages)[:2] == ["bookmark", "caught_up"]
    assert positions_of(messages) == list(range(1, 62))
    # Fifty users are more than a message has: only the last of them may be resumed from.
    inside = [message for message in messages if 10 < int(message["position"]) < 60]
    assert len(inside) >= 7
    assert not any(message["resume_token"] for message in inside)
    printed = events_of(messages)
    assert [_fields(event["user"]) for event in printed[10:]] == [_as_json(user) for user in (*group, later)]
    for event, expected in zip(printed, await replay(stub), strict=True):
        assert event["id"] == expected.id
        assert event["type"] == users_pb2.UserEvent.Type.Name(expected.type)
        assert event["changed_fields"] == expected.changed_fields
        assert int(event["commit_time"]["seconds"]) == expected.commit_time.seconds
        assert event["commit_time"]["nanos"] == expected.commit_time.nanos
    assert await watcher.stop() == 0


async def test_positions_beyond_what_a_double_holds(
    client: Client, services: Services, users_database: Database
) -> None:
    """A log of which retention has removed 2^53 events: a client that counts in doubles cannot tell its positions."""
    removed = 2**53
    await users_database.fetch(
        "UPDATE feed SET head_position = %s, earliest_position = %s,"
        " edge_event_id = gen_random_uuid(), edge_time = now()",
        removed,
        removed + 1,
    )
    service = await services.users(users_database).start()
    await _changes(stub_of(service), 1)
    for start in ("earliest", "snapshot"):
        watcher = client("watch", "--address", service.address, "--from", start, "--max-batch", "1")
        await watcher.launch()
        messages = await wait_printed(watcher, caught_up)
        assert messages[-1]["position"] == str(removed + 5)
        if start == "earliest":
            assert [event["position"] for event in events_of(messages)] == [str(removed + n) for n in range(1, 6)]
        else:
            assert {event["position"] for event in events_of(messages)} == {str(removed + 5)}


async def test_a_killed_client_goes_on_after_its_last_token(
    client: Client, services: Services, users_database: Database
) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    writing = asyncio.create_task(_changes(stub, 60))
    printed: list[Printed] = []
    start: tuple[str, ...] = ("--from", "earliest")
    for kills in (1, 2, 3):
        watcher = client("watch", "--address", service.address, *start, "--max-batch", "2")
        await watcher.launch()
        await wait_printed(watcher, passed(kills * 60))
        assert await watcher.kill(signal.SIGKILL) == -signal.SIGKILL
        # Another client has other connections.
        printed += [{**message, "connection": (kills, message["connection"])} for message in messages_of(watcher)]
        last = next(message["resume_token"] for message in reversed(printed) if message["resume_token"])
        start = ("--token", last)
    await writing
    watcher = client("watch", "--address", service.address, *start)
    await watcher.launch()
    printed += await wait_printed(watcher, passed(300))
    assert positions_of(printed) == list(range(1, 301))


async def test_another_replica_takes_over_from_one_that_drains(
    client: Client, services: Services, users_database: Database
) -> None:
    one, two = await services.users(users_database).start(), await services.users(users_database).start()
    watcher = client("watch", "--address", f"ipv4:{one.address},{two.address}", "--max-batch", "2")
    await watcher.launch()
    await _changes(stub_of(one), 2)
    await wait_printed(watcher, passed(10))
    writing = asyncio.create_task(_changes(stub_of(two), 30))
    one.send(signal.SIGTERM)
    assert await one.wait() == 0
    await writing
    messages = await wait_printed(watcher, passed(160))
    assert "drain" in marks_of(messages)
    assert messages[-1]["connection"] > 1
    assert positions_of(messages) == list(range(1, 161))


async def test_it_goes_on_after_the_service_was_killed(
    client: Client, services: Services, users_database: Database
) -> None:
    service = await services.users(users_database).start()
    watcher = client("watch", "--address", service.address, "--max-batch", "2")
    await watcher.launch()
    await _changes(stub_of(service), 2)
    await wait_printed(watcher, passed(10))
    await service.kill()
    await until(lambda: "connecting again" in watcher.tail())
    await service.restart()
    await _changes(stub_of(service), 2)
    messages = await wait_printed(watcher, passed(20))
    assert "drain" not in marks_of(messages)
    assert positions_of(messages) == list(range(1, 21))


async def test_shards_part_the_log(client: Client, services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    await _changes(stub, 10)
    watchers = [
        client("watch", "--address", service.address, "--shard", f"{index}/3", "--max-batch", "2") for index in range(3)
    ]
    for watcher in watchers:
        await watcher.launch()
    for watcher in watchers:
        await wait_printed(watcher, caught_up)
    await _changes(stub, 10)
    parts: list[int] = []
    for index, watcher in enumerate(watchers):
        expected = [event.position for event in await replay(stub) if _shard(event.user) == index]
        messages = await wait_printed(watcher, told(expected[-1]))
        assert positions_of(messages) == expected
        parts += expected
    assert sorted(parts) == list(range(1, await _head(stub) + 1))


async def test_a_snapshot_and_what_follows_is_the_table(
    client: Client, services: Services, users_database: Database
) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    await stub.BatchCreateUsers(_group(600))
    await _changes(stub, 10)
    watcher = client("watch", "--address", service.address, "--from", "snapshot", "--max-batch", "3")
    await watcher.launch()
    # Some before the snapshot begins, some while its pages are read, the rest live.
    await _changes(stub, 60)
    await wait_printed(watcher, caught_up)
    await _changes(stub, 5)
    messages = await wait_printed(watcher, passed(await _head(stub)))
    marks = [mark for mark in marks_of(messages) if mark.startswith("snapshot")]
    assert marks == ["snapshot_begin", "snapshot_end"]
    assert {event["type"] for event in events_of(messages)} == {"SNAPSHOT", "CREATED", "UPDATED", "DELETED"}
    assert await watcher.stop() == 0
    copy = sorted(watcher.records[-1]["copy"], key=lambda user: str(user["id"]))
    assert [_fields(user) for user in copy] == [_as_json(user) for user in await _living(stub)]


async def test_a_token_of_another_log_needs_a_snapshot(
    client: Client, services: Services, databases: Databases
) -> None:
    here = await services.users(await databases.users()).start()
    there = await services.users(await databases.users()).start()
    watcher = client("watch", "--address", here.address)
    await watcher.launch()
    foreign = (await wait_printed(watcher, caught_up))[-1]["resume_token"]
    code, said = await refusal(client("watch", "--address", there.address, "--token", foreign))
    assert code == 3
    assert "another log" in said
    code, said = await refusal(client("watch", "--address", there.address, "--token", "nonsense"))
    assert code == 1
    assert "resume_token" in said
