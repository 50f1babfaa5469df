"""UserService as a caller sees it, over a real socket on a real Postgres."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import pytest

from tests.harness import Database
from tests.users.calls import Log, Stub, create, refused, user
from tidings.users.v1 import users_pb2


async def _stored(database: Database) -> list[tuple[object, ...]]:
    return await database.fetch(
        "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM user_events), (SELECT count(*) FROM answers),"
        " (SELECT head_position FROM feed)"
    )


async def test_a_created_user_is_found_and_is_news(shared_stub: Stub, log: Log) -> None:
    asked = create(display_name="Ἀθηνᾶ", locale="el-GR", time_zone="Europe/Athens", labels={"team": "red"})
    made = await shared_stub.CreateUser(
        asked, metadata=[("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"), ("tracestate", "x=y")]
    )
    assert uuid.UUID(made.id).version == 7
    assert made.version == 1
    assert made.create_time == made.update_time
    assert await shared_stub.GetUser(users_pb2.GetUserRequest(id=made.id)) == made
    [event] = await log.events()
    assert event.type == users_pb2.UserEvent.CREATED
    assert event.user == made
    assert event.commit_time == made.create_time
    assert list(event.changed_fields) == ["username", "email", "display_name", "locale", "time_zone", "labels"]
    assert event.trace_parent == f"00-{'ab' * 16}-{'cd' * 8}-01"
    assert event.trace_state == "x=y"
    feed = await shared_stub.GetFeed(users_pb2.GetFeedRequest())
    assert (feed.earliest_position, feed.head_position, feed.head_time) == (1, log.position + 1, event.commit_time)


async def test_update_changes_what_the_mask_names(shared_stub: Stub, log: Log) -> None:
    made = await shared_stub.CreateUser(create(display_name="Before", labels={"team": "red"}))
    wanted = users_pb2.User(id=made.id, version=1, display_name="After", email="ignored@example.com", labels={"a": "b"})
    updated = await shared_stub.UpdateUser(
        users_pb2.UpdateUserRequest(user=wanted, update_mask={"paths": ["labels", "display_name"]})
    )
    assert (updated.display_name, dict(updated.labels), updated.email) == ("After", {"a": "b"}, made.email)
    assert updated.version == 2
    event = (await log.events(include_previous=True))[-1]
    assert event.type == users_pb2.UserEvent.UPDATED
    assert list(event.changed_fields) == ["display_name", "labels"]
    assert (event.previous, event.user) == (made, updated)
    assert not (await log.events())[-1].HasField("previous")


async def test_an_update_that_changes_nothing_is_no_news(shared_stub: Stub, log: Log) -> None:
    made = await shared_stub.CreateUser(create())
    same = users_pb2.UpdateUserRequest(user=made, update_mask={"paths": ["username", "email"]})
    assert await shared_stub.UpdateUser(same) == made
    assert len(await log.events()) == 1


async def test_delete_frees_the_names_and_undelete_needs_them(shared_stub: Stub, log: Log) -> None:
    made = await shared_stub.CreateUser(create())
    deleted = await shared_stub.DeleteUser(users_pb2.DeleteUserRequest(id=made.id, version=1))
    assert deleted.HasField("delete_time")
    assert deleted.purge_time.ToDatetime() > deleted.delete_time.ToDatetime()
    assert await shared_stub.GetUser(users_pb2.GetUserRequest(id=made.id)) == deleted
    assert (await refused(shared_stub.DeleteUser(users_pb2.DeleteUserRequest(id=made.id)))).reason == "USER_NOT_FOUND"

    heir = await shared_stub.CreateUser(create(username=made.username))
    undelete = users_pb2.UndeleteUserRequest(id=made.id)
    assert (await refused(shared_stub.UndeleteUser(undelete))).reason == "USERNAME_TAKEN"
    await shared_stub.DeleteUser(users_pb2.DeleteUserRequest(id=heir.id))
    heir = await shared_stub.CreateUser(create(email=made.email))
    assert (await refused(shared_stub.UndeleteUser(undelete))).reason == "EMAIL_TAKEN"
    await shared_stub.DeleteUser(users_pb2.DeleteUserRequest(id=heir.id))

    back = await shared_stub.UndeleteUser(undelete)
    assert not back.HasField("delete_time")
    assert not back.HasField("purge_time")
    assert back.version == 3
    assert (await refused(shared_stub.UndeleteUser(undelete))).reason == "USER_NOT_DELETED"
    types = [event.type for event in await log.events() if event.user.id == made.id]
    assert types == [users_pb2.UserEvent.CREATED, users_pb2.UserEvent.DELETED, users_pb2.UserEvent.UNDELETED]


async def test_refusals_name_the_field_and_store_nothing(
    shared_stub: Stub, shared_database: Database, log: Log
) -> None:
    taken = await shared_stub.CreateUser(create())
    before = await _stored(shared_database)
    nobody = str(uuid.uuid4())
    mask = {"paths": ["display_name"]}
    update, get = users_pb2.UpdateUserRequest, users_pb2.GetUserRequest
    call, bad = shared_stub, "INVALID_ARGUMENT"
    cases = [
        (call.CreateUser(create(username="A")), bad, "INVALID_FIELD", ["user.username"]),
        (call.CreateUser(create(email="x", locale="?")), bad, "INVALID_FIELD",
         ["user.email", "user.locale"]),
        (call.CreateUser(create(request_id="7")), bad, "INVALID_FIELD", ["request_id"]),
        (call.CreateUser(users_pb2.CreateUserRequest()), bad, "INVALID_FIELD",
         ["user", "user.username", "user.email"]),
        (call.CreateUser(create(username=taken.username)), "ALREADY_EXISTS", "USERNAME_TAKEN", []),
        (call.CreateUser(create(email=taken.email.upper())), "ALREADY_EXISTS", "EMAIL_TAKEN", []),
        (call.UpdateUser(update(user={"id": nobody}, update_mask=mask)), "NOT_FOUND", "USER_NOT_FOUND", []),
        (call.UpdateUser(update(user={"id": "x"}, update_mask=mask)), bad, "INVALID_FIELD", ["user.id"]),
        (call.UpdateUser(update(user={"id": taken.id})), bad, "INVALID_FIELD", ["update_mask"]),
        (call.UpdateUser(update(user={"id": taken.id}, update_mask={"paths": ["version"]})), bad,
         "INVALID_FIELD", ["update_mask"]),
        (call.UpdateUser(update(user={"id": taken.id, "version": 9}, update_mask=mask)), "ABORTED", "STALE_VERSION",
         []),
        (call.DeleteUser(users_pb2.DeleteUserRequest(id=taken.id, version=2)), "ABORTED", "STALE_VERSION", []),
        (call.UndeleteUser(users_pb2.UndeleteUserRequest(id=nobody)), "NOT_FOUND", "USER_NOT_FOUND", []),
        (call.GetUser(get(id=nobody)), "NOT_FOUND", "USER_NOT_FOUND", []),
        (call.GetUser(get()), bad, "INVALID_FIELD", ["id"]),
        (call.BatchGetUsers(users_pb2.BatchGetUsersRequest(ids=[taken.id, nobody])), "NOT_FOUND", "USER_NOT_FOUND", []),
        (call.BatchCreateUsers(users_pb2.BatchCreateUsersRequest()), bad, "INVALID_FIELD", ["requests"]),
    ]  # fmt: skip
    for asked, code, reason, fields in cases:
        said = await refused(asked)
        assert (said.code.name, said.reason, said.fields) == (code, reason, fields), said
    assert await _stored(shared_database) == before
    said = await refused(shared_stub.CreateUser(create(username=taken.username)))
    assert said.metadata == {"field": "user.username", "value": taken.username}


async def test_a_request_larger_than_the_limit_is_refused(shared_stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await shared_stub.CreateUser(create(labels={"big": "x" * 5_000_000}))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "4194304" in (caught.value.details() or "")


async def test_validate_only_stores_nothing(shared_stub: Stub, shared_database: Database, log: Log) -> None:
    taken = await shared_stub.CreateUser(create())
    before = await _stored(shared_database)
    would_be = await shared_stub.CreateUser(
        users_pb2.CreateUserRequest(user=user(), validate_only=True, request_id=str(uuid.uuid4()))
    )
    assert would_be.version == 1
    said = await refused(
        shared_stub.CreateUser(users_pb2.CreateUserRequest(user=user(email=taken.email), validate_only=True))
    )
    assert said.reason == "EMAIL_TAKEN"
    assert await _stored(shared_database) == before


async def test_a_retry_gets_the_first_answer(shared_stub: Stub, log: Log) -> None:
    asked = create()
    first = await shared_stub.CreateUser(asked)
    mask = {"paths": ["display_name"]}
    change = users_pb2.UpdateUserRequest(
        user={"id": first.id, "display_name": "Later"}, update_mask=mask, request_id=str(uuid.uuid4())
    )
    updated = await shared_stub.UpdateUser(change)
    assert await shared_stub.CreateUser(asked) == first
    assert await shared_stub.UpdateUser(change) == updated
    delete = users_pb2.DeleteUserRequest(id=first.id, request_id=str(uuid.uuid4()))
    deleted = await shared_stub.DeleteUser(delete)
    assert await shared_stub.DeleteUser(delete) == deleted
    undelete = users_pb2.UndeleteUserRequest(id=first.id, request_id=str(uuid.uuid4()))
    back = await shared_stub.UndeleteUser(undelete)
    assert await shared_stub.UndeleteUser(undelete) == back
    assert len(await log.events()) == 4

    other = create(request_id=asked.request_id)
    said = await refused(shared_stub.CreateUser(other))
    assert (said.code, said.reason, said.fields) == (
        grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", ["request_id"]
    )  # fmt: skip
    # Another method is another scope.
    assert (
        await shared_stub.DeleteUser(users_pb2.DeleteUserRequest(id=first.id, request_id=asked.request_id))
    ).version == 5


async def test_a_refusal_is_not_kept_for_a_retry(shared_stub: Stub, log: Log) -> None:
    holder = await shared_stub.CreateUser(create())
    asked = create(email=holder.email)
    assert (await refused(shared_stub.CreateUser(asked))).reason == "EMAIL_TAKEN"
    await shared_stub.DeleteUser(users_pb2.DeleteUserRequest(id=holder.id))
    assert (await shared_stub.CreateUser(asked)).email == holder.email


async def test_concurrent_retries_make_one_user(shared_stub: Stub, log: Log) -> None:
    asked = create()
    answers = await asyncio.gather(*(shared_stub.CreateUser(asked) for _ in range(20)))
    assert len({answer.id for answer in answers}) == 1
    assert len(await log.events()) == 1


async def test_batch_create_is_all_or_nothing(shared_stub: Stub, shared_database: Database, log: Log) -> None:
    requests = [create() for _ in range(300)]
    batch = users_pb2.BatchCreateUsersRequest(requests=requests)
    made = await shared_stub.BatchCreateUsers(batch)
    assert [made_user.username for made_user in made.users] == [request.user.username for request in requests]
    assert await shared_stub.BatchCreateUsers(batch) == made
    assert [event.user for event in await log.events()] == list(made.users)

    before = await _stored(shared_database)
    taken = users_pb2.BatchCreateUsersRequest(requests=[create(), create(email=made.users[0].email), create()])
    said = await refused(shared_stub.BatchCreateUsers(taken))
    assert (said.reason, said.metadata["field"]) == ("EMAIL_TAKEN", "requests[1].user.email")
    twice = users_pb2.BatchCreateUsersRequest(requests=[create(username="twin"), create(username="twin")])
    said = await refused(shared_stub.BatchCreateUsers(twice))
    assert (said.reason, said.metadata["field"]) == ("USERNAME_TAKEN", "requests[1].user.username")
    bad = users_pb2.BatchCreateUsersRequest(requests=[create(), create(username="NO"), create(request_id="")])
    assert (await refused(shared_stub.BatchCreateUsers(bad))).fields == ["requests[1].user.username"]
    assert await _stored(shared_database) == before


async def test_a_group_is_not_split_by_a_token(shared_stub: Stub, log: Log) -> None:
    await shared_stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=[create() for _ in range(25)]))
    await shared_stub.CreateUser(create())
    stream = shared_stub.WatchUsers(users_pb2.WatchUsersRequest(resume_token=log.token, max_batch=10))
    seen = []
    async for message in stream:
        if message.events:
            seen.append((len(message.events), bool(message.resume_token)))
        if message.HasField("caught_up"):
            stream.cancel()
            break
    assert seen == [(10, False), (10, False), (6, True)] or seen == [(10, False), (10, False), (5, True), (1, True)]


async def test_lists_are_paged_and_filtered(stub: Stub) -> None:
    for name in ("anna", "anton", "berta", "bert", "zoe"):
        await stub.CreateUser(create(username=name, email=f"{name.upper()}@example.com"))
    gone = await stub.CreateUser(create(username="antje"))
    await stub.DeleteUser(users_pb2.DeleteUserRequest(id=gone.id))

    async def names(**fields: object) -> list[str]:
        found, token = [], ""
        while True:
            page = await stub.ListUsers(users_pb2.ListUsersRequest(page_size=2, page_token=token, **fields))
            assert len(page.users) <= 2
            found += [listed.username for listed in page.users]
            token = page.next_page_token
            if not token:
                return found

    assert await names() == ["anna", "anton", "berta", "bert", "zoe"]
    assert await names(show_deleted=True) == ["anna", "anton", "berta", "bert", "zoe", "antje"]
    assert await names(filter={"username_prefix": "an"}) == ["anna", "anton"]
    assert await names(filter={"username_prefix": "an"}, show_deleted=True) == ["anna", "anton", "antje"]
    assert await names(filter={"email_prefix": "Bert"}) == ["berta", "bert"]
    assert await names(filter={"username_prefix": "b", "email_prefix": "berta@"}) == ["berta"]
    assert await names(filter={"username_prefix": "%"}) == []

    page = await stub.ListUsers(users_pb2.ListUsersRequest(page_size=1))
    other = users_pb2.ListUsersRequest(page_size=1, page_token=page.next_page_token, show_deleted=True)
    assert (await refused(stub.ListUsers(other))).reason == "TOKEN_MISMATCH"
    assert (await refused(stub.ListUsers(users_pb2.ListUsersRequest(page_token="x")))).reason == "BAD_TOKEN"
    assert (await refused(stub.ListUsers(users_pb2.ListUsersRequest(page_size=-1)))).reason == "INVALID_FIELD"


async def test_batch_get_keeps_the_order(shared_stub: Stub) -> None:
    made = [await shared_stub.CreateUser(create()) for _ in range(3)]
    ids = [made[2].id, made[0].id, made[2].id]
    answer = await shared_stub.BatchGetUsers(users_pb2.BatchGetUsersRequest(ids=ids))
    assert [found.id for found in answer.users] == ids
