"""The in-app inbox over a real gRPC connection: against a plain model, on two replicas, by its indexes."""

from __future__ import annotations

import asyncio
import base64
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import empty_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from notification_service import tokens
from notification_service.api.in_app import InAppService
from notification_service.api.notifications import NotificationService
from notification_service.domain import Change
from notification_service.store import feed, in_app, reads
from notification_service.tail import Tail
from notification_service.watch import Streams
from servicekit import callers, database, guard
from servicekit.database import Connection, Pool
from tests.harness import Databases, Services
from tests.notifications.conftest import explainer
from tests.notifications.test_api import refusal
from tidings.client import InApp, NotificationBatch, Users, connect
from tidings.notifications.v1 import in_app_pb2 as pb
from tidings.notifications.v1 import in_app_pb2_grpc, notifications_pb2, notifications_pb2_grpc
from tidings.users.v1 import users_pb2

EMPTY = empty_pb2.Empty()
UPDATE, LIST = pb.UpdateInAppNotificationsRequest, pb.ListInAppNotificationsRequest
ADA, BOB = uuid.UUID(int=1), uuid.UUID(int=2)

# What the inbox does with a batch, without events to make it of: the next positions, in one transaction.
_ADD = """
WITH moved AS (
    UPDATE inbox SET notification_position = notification_position + %(count)s RETURNING notification_position AS head
)
INSERT INTO notifications (id, position, user_id, event_id, event_position, rule, category, template, channels,
                           create_time)
SELECT gen_random_uuid(), head - %(count)s + n, %(user)s, gen_random_uuid(), n, 'rule', %(category)s, 'welcome',
       string_to_array(%(channels)s, ','), now()
  FROM moved, generate_series(1, %(count)s) AS n
RETURNING id, position
"""


async def add(
    connection: Connection, user: uuid.UUID = ADA, count: int = 1, channels: str = "in_app,email", category: str = "a"
) -> list[str]:
    """Stores notifications; returns their ids, oldest first."""
    await feed.read_cursor(connection)
    values = {"count": count, "user": user, "channels": channels, "category": category}
    rows = await (await connection.execute(_ADD, values)).fetchall()
    return [str(one) for one, _ in sorted(rows, key=lambda row: row[1])]


@dataclass
class Replica:
    inbox: Callable[..., InApp]
    service: in_app_pb2_grpc.InAppServiceAsyncStub
    watching: notifications_pb2_grpc.NotificationServiceAsyncStub


@asynccontextmanager
async def replica(pool: Pool) -> AsyncIterator[Replica]:
    """Both services over a pool and a tail of their own."""
    tail = Tail(pool, 0.05)
    streams = Streams(
        pool, tail, max_streams=10, max_streams_per_caller=10, max_stream_age=1800.0, reconnect_spread=3.0
    )
    server = grpc.aio.server()
    add_first = notifications_pb2_grpc.add_NotificationServiceServicer_to_server
    guard.add(server, callers.anyone, add_first, NotificationService(pool, streams, explainer(pool), lambda: None))
    guard.add(server, callers.anyone, in_app_pb2_grpc.add_InAppServiceServicer_to_server, InAppService(pool, tail.hint))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop = asyncio.create_task(tail.run())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Replica(
            lambda user=ADA: InApp(channel, str(user)),
            in_app_pb2_grpc.InAppServiceStub(channel),
            notifications_pb2_grpc.NotificationServiceStub(channel),
        )
        await streams.drain(1.0)
    await server.stop(1.0)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


@pytest.fixture
async def here(pool: Pool) -> AsyncIterator[Replica]:
    async with replica(pool) as made:
        yield made


@pytest.fixture
async def there(url: str) -> AsyncIterator[Replica]:
    """Another replica on the same database."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(database.pool(url, "there", size=4))
        yield await stack.enter_async_context(replica(pool))


def numbers(counts: notifications_pb2.InAppCounts) -> tuple[int, int, int]:
    return counts.total, counts.unseen, counts.unread


async def test_lists_are_of_one_user_and_paged(here: Replica, connection: Connection) -> None:
    ids = await add(connection, count=5)
    await add(connection, BOB)
    await add(connection, channels="email")
    ids += await add(connection, category="b")
    ada = here.inbox()
    assert [one.id async for one in ada.list(page_size=2)] == ids[::-1]
    assert [one.id async for one in ada.list(category="b")] == ids[-1:]
    await ada.change(UPDATE.SEEN, ids[:2])
    await ada.change(UPDATE.READ, ids[1:3])
    await ada.change(UPDATE.ARCHIVE, [ids[0], ids[5]])
    assert [one.id async for one in ada.list()] == ids[4:0:-1]
    assert [one.id async for one in ada.list(unread=True)] == [ids[4], ids[3]]
    assert [one.id async for one in ada.list(unseen=True, archived=None)] == [ids[5], ids[4], ids[3]]
    assert [one.id async for one in ada.list(archived=True)] == [ids[5], ids[0]]
    (newest, *_) = [one async for one in ada.list(archived=True)]
    assert newest.HasField("archive_time")
    assert not newest.HasField("read_time")
    counts = await ada.counts()
    assert (numbers(counts), counts.position) == ((4, 2, 2), 8)
    assert numbers(await here.inbox(BOB).counts()) == (1, 1, 1)
    assert numbers(await here.inbox(uuid.uuid4()).counts()) == (0, 0, 0)


async def test_what_is_refused_changes_nothing(here: Replica, connection: Connection) -> None:
    (mine,) = await add(connection)
    (other,) = await add(connection, BOB)
    (mail,) = await add(connection, channels="email")
    user = str(ADA)
    page = await here.service.ListInAppNotifications(LIST(user_id=str(ADA)))
    assert not page.next_page_token
    await add(connection)
    page = await here.service.ListInAppNotifications(LIST(user_id=user, page_size=1))
    invalid, unknown = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    update, listed = here.service.UpdateInAppNotifications, here.service.ListInAppNotifications
    cases: list[tuple[Any, grpc.StatusCode, str, list[str]]] = [
        (update(UPDATE(user_id=user, change=UPDATE.READ, ids=[mine, other])), unknown, "UNKNOWN_NOTIFICATION", []),
        (update(UPDATE(user_id=user, change=UPDATE.READ, ids=[mine, mail])), unknown, "UNKNOWN_NOTIFICATION", []),
        (update(UPDATE(user_id=user, change=UPDATE.READ, ids=[str(ADA)])), unknown, "UNKNOWN_NOTIFICATION", []),
        (update(UPDATE(ids=["x"])), invalid, "INVALID_FIELD", ["user_id", "change", "ids[0]"]),
        (update(UPDATE(user_id=user, change=UPDATE.READ)), invalid, "INVALID_FIELD", ["ids"]),
        (update(UPDATE(user_id=user, change=UPDATE.READ, ids=[mine] * 1001)), invalid, "INVALID_FIELD", ["ids"]),
        (update(UPDATE(user_id=user, change=UPDATE.READ, up_to_position=5)), invalid, "INVALID_FIELD",
         ["up_to_position"]),
        (listed(LIST()), invalid, "INVALID_FIELD", ["user_id"]),
        (listed(LIST(user_id=user, page_size=-1)), invalid, "INVALID_FIELD", []),
        (listed(LIST(user_id=str(BOB), page_token=page.next_page_token)), invalid, "TOKEN_MISMATCH", ["page_token"]),
        (here.service.GetInAppCounts(pb.GetInAppCountsRequest(user_id="x")), invalid, "INVALID_FIELD", ["user_id"]),
    ]  # fmt: skip
    for call, code, reason, fields in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert refusal(caught.value)[:2] == (code, reason)
        if fields:
            assert refusal(caught.value)[2] == fields
    assert numbers(await here.inbox().counts()) == (2, 2, 2)


async def test_all_up_to_a_position_leaves_what_came_after_it(here: Replica, connection: Connection) -> None:
    await add(connection, count=5)
    seen = (await here.inbox().counts()).position
    await add(connection, count=2)
    await add(connection, BOB)
    answer = await here.inbox().change_all(UPDATE.READ, seen)
    assert (answer.changed, numbers(answer.counts)) == (5, (7, 2, 2))
    assert (await here.inbox().change_all(UPDATE.READ, seen)).changed == 0
    # In transactions of fewer than there are.
    assert await in_app.change_all(connection, ADA, Change.ARCHIVE, 7, page=3) == 7
    assert numbers((await in_app.counts(connection, ADA)).counts) == (0, 0, 0)
    assert await in_app.change_all(connection, ADA, Change.UNARCHIVE, 7, page=7) == 7
    assert numbers(await here.inbox(BOB).counts()) == (1, 1, 1)


async def test_devices_that_mark_at_once_do_not_lock_each_other_out(
    here: Replica, there: Replica, connection: Connection
) -> None:
    ids = await add(connection, count=300)
    answers = await asyncio.gather(
        *(here.inbox().change(UPDATE.READ, ids) for _ in range(4)),
        *(there.inbox().change(UPDATE.READ, ids[::-1]) for _ in range(4)),
        here.inbox().change_all(UPDATE.SEEN, 300),
    )
    assert sum(one.changed for one in answers[:-1]) == 300
    assert numbers(await here.inbox().counts()) == (300, 0, 0)


@dataclass
class Model:
    """What a user's inbox is, told plainly: (seen, read, archived) of each."""

    states: list[tuple[bool, bool, bool]] = field(default_factory=list)

    def change(self, change: Change, where: set[int]) -> int:
        changed = 0
        for number in where:
            before = self.states[number]
            seen, read, archived = before
            match change:
                case Change.SEEN:
                    seen = True
                case Change.READ:
                    seen = read = True
                case Change.UNREAD:
                    read = False
                case Change.ARCHIVE:
                    archived = True
                case Change.UNARCHIVE:
                    archived = False
            self.states[number] = seen, read, archived
            changed += self.states[number] != before
        return changed

    def change_all(self, change: Change, upto: int) -> int:
        wanted = change is Change.UNARCHIVE
        return self.change(change, {number for number in range(upto) if self.states[number][2] is wanted})

    def counts(self) -> tuple[int, int, int]:
        kept = [(seen, read) for seen, read, archived in self.states if not archived]
        return len(kept), sum(not seen for seen, _ in kept), sum(not read for _, read in kept)


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 3)),
        st.tuples(st.sampled_from(Change), st.sets(st.integers(0, 5), min_size=1)),
        st.tuples(st.sampled_from(Change), st.integers(0, 6)),
    ),
    max_size=12,
)


def test_changes_are_those_of_a_plain_model(url: str) -> None:
    """By ids and by position, in any order."""

    async def play(steps: list[tuple[Any, Any]]) -> None:
        async with await database.connect(url, "model") as connection:
            await feed.read_cursor(connection)
            user, model, ids = uuid.uuid4(), Model(), list[str]()
            before = await reads.head(connection)
            for kind, what in steps:
                if kind == "add":
                    ids += await add(connection, user, what)
                    model.states += [(False, False, False)] * what
                elif isinstance(what, set):
                    where = {number for number in what if number < len(ids)}
                    chosen = [uuid.UUID(ids[number]) for number in where]
                    if chosen:
                        assert await in_app.change(connection, user, kind, chosen) == model.change(kind, where)
                else:
                    upto = min(what, len(ids))
                    changed = await in_app.change_all(connection, user, kind, before + upto, page=2)
                    assert changed == model.change_all(kind, upto)
                counted = await in_app.counts(connection, user)
                assert numbers(counted.counts) == model.counts()
            listed = await in_app.list_notifications(connection, user, in_app.Wanted(archived=None), 1 << 62, 100)
            times = [[one.HasField(f"{name}_time") for name in ("seen", "read", "archive")] for one in listed]
            assert [tuple(one) for one in times] == model.states[::-1]

    @settings(max_examples=40, deadline=None)
    @given(_STEPS)
    def check(steps: list[tuple[Any, Any]]) -> None:
        asyncio.run(play(steps))

    check()


async def until(batches: AsyncIterator[NotificationBatch], wanted: tuple[int, int, int]) -> int:
    """Reads until the counts are these; returns how many notifications came."""
    came = 0
    async with asyncio.timeout(10.0):
        async for batch in batches:
            came += len(batch.events)
            if batch.in_app_counts is not None and numbers(batch.in_app_counts) == wanted:
                return came
    raise AssertionError("the stream has ended")


async def test_a_badge_is_drawn_from_the_stream_of_any_replica(
    here: Replica, there: Replica, connection: Connection
) -> None:
    ids = await add(connection, count=2)
    phone, laptop = here.inbox().watch(), there.inbox().watch()
    for stream in (phone, laptop):
        assert await until(stream, (2, 2, 2)) == 0
    ids += await add(connection)
    await add(connection, BOB)
    for stream in (phone, laptop):
        assert await until(stream, (3, 3, 3)) == 1
    await here.inbox().change(UPDATE.READ, ids[:2])
    await here.inbox(BOB).change_all(UPDATE.READ, 4)
    for stream in (phone, laptop):
        assert await until(stream, (3, 1, 1)) == 0
    await there.inbox().change(UPDATE.UNREAD, ids[:1])
    await there.inbox().change_all(UPDATE.ARCHIVE, 2)
    for stream in (phone, laptop):
        assert await until(stream, (1, 1, 1)) == 0
        await stream.aclose()


async def test_a_stream_of_all_users_has_no_counts(here: Replica, connection: Connection) -> None:
    await add(connection)
    request = notifications_pb2.WatchNotificationsRequest
    for user, told in (("", False), (str(ADA), True)):
        call = here.watching.WatchNotifications(request(now=EMPTY, user_id=user))
        assert (await anext(aiter(call))).HasField("in_app_counts") is told
        call.cancel()


async def test_tokens_are_of_a_log(here: Replica, connection: Connection) -> None:
    await add(connection, count=3)
    request = notifications_pb2.WatchNotificationsRequest
    selection = tokens.selection_hash("WatchNotifications", "")
    found = await reads.log(connection)
    assert found is not None
    log_id, _ = found
    first = await anext(aiter(here.watching.WatchNotifications(request(now=EMPTY))))
    assert first.resume_token == tokens.encode_resume(log_id, 3, selection)
    # As the release before makes them: without a log.
    old = base64.urlsafe_b64encode(struct.pack("!BcQ8s", 1, b"r", 2, selection)).rstrip(b"=").decode()
    for token, position in ((old, 2), (first.resume_token, 3)):
        call = here.watching.WatchNotifications(request(resume_token=token))
        assert (await anext(aiter(call))).position == position
        call.cancel()
    lost, wrong = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
    cases = [
        (tokens.encode_resume(uuid.uuid4(), 2, selection), "", lost, "FOREIGN_TOKEN"),
        (tokens.encode_resume(log_id, 4, selection), "", lost, "FUTURE_TOKEN"),
        (first.resume_token, str(ADA), wrong, "TOKEN_MISMATCH"),
        (old, str(ADA), wrong, "TOKEN_MISMATCH"),
        (first.resume_token[:-4], "", wrong, "BAD_TOKEN"),
        (tokens.encode_page(2, selection), "", wrong, "BAD_TOKEN"),
        ("?", "", wrong, "BAD_TOKEN"),
        ("A", "", wrong, "BAD_TOKEN"),
    ]
    for token, user, code, reason in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(here.watching.WatchNotifications(request(resume_token=token, user_id=user))))
        assert refusal(caught.value)[:2] == (code, reason)


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (in_app._COUNTS, "notifications_in_app_idx"),
        (in_app._COUNTS, "notifications_unseen_idx"),
        (in_app._COUNTS, "notifications_unread_idx"),
        (in_app._list(False, False, False, False), "notifications_in_app_idx"),
        (in_app._list(False, False, None, False), "notifications_user_id_position_idx"),
        (in_app._list(True, False, False, False), "notifications_unread_idx"),
        (in_app._list(False, True, False, False), "notifications_unseen_idx"),
        (in_app._list(False, False, True, False), "notifications_archived_idx"),
        (in_app._change_page(Change.READ), "notifications_unread_idx"),
    ],
)
async def test_statements_go_by_their_index(connection: Connection, statement: str, index: str) -> None:
    await add(connection, count=2000)
    for number in range(5):
        await add(connection, uuid.UUID(int=10 + number), 2000)
    await in_app.change_all(connection, ADA, Change.READ, 1990, page=5000)
    await in_app.change_all(connection, ADA, Change.ARCHIVE, 10)
    await connection.execute("VACUUM ANALYZE notifications")
    values = {"user_id": ADA, "before": 1 << 62, "most": 50, "after": 0, "upto": 2000}
    rows = await (await connection.execute(f"EXPLAIN {statement}", values)).fetchall()
    plan = "\n".join(str(row[0]) for row in rows)
    assert index in plan
    assert "Seq Scan on notifications" not in plan


async def test_an_old_inbox_is_not_looked_for_among_what_came_after_it(connection: Connection) -> None:
    """The index of all positions does not serve these statements, however the planner weighs what there is."""
    await add(connection, count=2000)
    await connection.execute("ANALYZE notifications")
    values = {"user_id": ADA, "before": 1 << 62, "most": 50, "after": 0, "upto": 2000}
    async with connection.transaction(force_rollback=True):
        for name in ("in_app", "unseen", "unread", "archived", "user_id_position"):
            await connection.execute(f"DROP INDEX notifications_{name}_idx")
        for statement in (
            *(in_app._list(unread, False, archived, False) for unread in (False, True) for archived in (False, None)),
            in_app._change_page(Change.READ),
        ):
            rows = await (await connection.execute(f"EXPLAIN {statement}", values)).fetchall()
            assert "notifications_position_key" not in "\n".join(str(row[0]) for row in rows)


async def test_the_whole_way_through_both_services(databases: Databases, services: Services) -> None:
    users = await services.users(await databases.users()).start()
    environment = {
        "TIDINGS_NOTIFICATIONS_DATABASE_URL": (await databases.notifications()).url,
        "TIDINGS_NOTIFICATIONS_USERS_ADDRESS": users.address,
    }
    process = services.process(
        "notification_service", "serve", environment=environment, listen_variable="TIDINGS_NOTIFICATIONS_LISTEN"
    )
    await process.start()
    async with connect(users.address) as channel:
        ada = await Users(channel).create(users_pb2.User(username="ada", email="ada@example.com"))
    async with connect(process.address) as channel:
        inbox = InApp(channel, ada.id)
        stream = inbox.watch(start="earliest")
        await until(stream, (1, 1, 1))
        (welcome,) = [one async for one in inbox.list()]
        assert welcome.subject == "Welcome, ada"
        assert (await inbox.change(UPDATE.READ, [welcome.id])).changed == 1
        await until(stream, (1, 0, 0))
        await stream.aclose()
