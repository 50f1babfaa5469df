"""The API over a real gRPC connection, on what the inbox has stored in a real Postgres."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2, empty_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from notification_service.api.notifications import NotificationService
from notification_service.compose import Composer
from notification_service.inbox import Inbox
from notification_service.store import feed, leases
from notification_service.tail import Tail
from notification_service.watch import Streams
from servicekit import callers, guard
from servicekit.database import Connection, Pool
from tests.notifications.conftest import Events, batch, explainer
from tidings.notifications.v1 import notifications_pb2 as pb
from tidings.notifications.v1 import notifications_pb2_grpc
from tidings.users.v1 import users_pb2

EMPTY = empty_pb2.Empty()


@dataclass
class Api:
    stub: notifications_pb2_grpc.NotificationServiceAsyncStub
    streams: Streams
    tail: Tail
    connection: Connection
    inbox: Inbox

    async def store(self, *events: users_pb2.UserEvent) -> None:
        """What a replica's subscriber does with a batch."""
        await self.inbox.store(self.connection, await feed.read_cursor(self.connection), batch(*events))


@pytest.fixture
async def api(pool: Pool, connection: Connection, composer: Composer) -> AsyncIterator[Api]:
    await feed.read_cursor(connection)
    tail = Tail(pool, 0.05)
    streams = Streams(
        pool, tail, max_streams=10, max_streams_per_caller=10, max_stream_age=1800.0, reconnect_spread=3.0
    )
    server = grpc.aio.server()
    guard.add(
        server,
        callers.anyone,
        notifications_pb2_grpc.add_NotificationServiceServicer_to_server,
        NotificationService(pool, streams, explainer(pool), lambda: None),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop = asyncio.create_task(tail.run())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: notifications_pb2_grpc.NotificationServiceAsyncStub = notifications_pb2_grpc.NotificationServiceStub(
            channel
        )
        yield Api(stub, streams, tail, connection, Inbox(composer, tail.hint))
        await streams.drain(1.0)
    await server.stop(1.0)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


def refusal(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, list[str]]:
    """Code, reason and the fields named."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if not detail.Unpack(info):
            detail.Unpack(request)
    return error.code(), info.reason, [violation.field for violation in request.field_violations]


async def test_lists_are_paged_newest_first(api: Api, events: Events) -> None:
    await api.store(*(events.created(f"user{number}") for number in range(7)))
    seen, token = [], ""
    for size in (3, 3, 1):
        page = await api.stub.ListNotifications(pb.ListNotificationsRequest(page_size=3, page_token=token))
        assert len(page.notifications) == size
        seen += [one.position for one in page.notifications]
        token = page.next_page_token
        # What comes in between does not shift the pages.
        await api.store(events.created(f"late{size}{len(seen)}"))
    assert (seen, token) == ([7, 6, 5, 4, 3, 2, 1], "")

    first = await api.stub.ListDeliveries(pb.ListDeliveriesRequest(page_size=9))
    rest = await api.stub.ListDeliveries(pb.ListDeliveriesRequest(page_size=9, page_token=first.next_page_token))
    assert (len(first.deliveries), len(rest.deliveries), rest.next_page_token) == (9, 1, "")


async def test_filters(api: Api, events: Events) -> None:
    ada = events.user("ada")
    made = [events.created("bob"), events.updated(ada, email="new@example.com"), events.deleted(ada)]
    await api.store(*made)

    async def rules(**filters: str) -> list[str]:
        asked = pb.ListNotificationsRequest(filter=pb.ListNotificationsRequest.Filter(**filters))
        return [one.rule for one in (await api.stub.ListNotifications(asked)).notifications]

    assert await rules() == ["goodbye", "email-changed", "welcome"]
    assert await rules(user_id=ada.id) == ["goodbye", "email-changed"]
    assert await rules(event_id=made[0].id) == ["welcome"]
    assert await rules(category="security") == ["email-changed"]
    assert await rules(user_id=ada.id, category="account") == ["goodbye"]
    assert await rules(user_id=str(uuid.uuid4())) == []

    picked, _ = await leases.pick(api.connection, "email", 1, None, seconds=30.0, max_tries=8, busy=[])
    (leased,) = await leases.begin(api.connection, [(one, "smtp") for one in picked], max_age=3600.0)

    async def targets(**filters: object) -> list[str]:
        asked = pb.ListDeliveriesRequest(filter=pb.ListDeliveriesRequest.Filter(**filters))
        return [one.target for one in (await api.stub.ListDeliveries(asked)).deliveries]

    assert await targets() == ["ada@example.com", "new@example.com", "ada@example.com", "bob@example.com"]
    assert await targets(user_id=made[0].user.id) == ["bob@example.com"]
    # ada was deleted: what was pending for her is not sent any more, but for what says so.
    assert await targets(channel="email", state=pb.Delivery.PENDING) == ["ada@example.com", "bob@example.com"]
    assert len(await targets(channel="email", state=pb.Delivery.CANCELLED)) == 2
    assert await targets(state=pb.Delivery.DELIVERED) == []
    assert await targets(channel="webhook") == []
    (found,) = (
        await api.stub.ListDeliveries(
            pb.ListDeliveriesRequest(
                filter=pb.ListDeliveriesRequest.Filter(user_id=made[0].user.id, state=pb.Delivery.PENDING)
            )
        )
    ).deliveries
    assert found.id == str(leased.id)
    assert [attempt.outcome for attempt in found.attempts] == [pb.Delivery.Attempt.UNKNOWN]


async def test_requests_that_are_refused(api: Api, events: Events) -> None:
    await api.store(*(events.created(f"user{number}") for number in range(3)))
    page = await api.stub.ListNotifications(pb.ListNotificationsRequest(page_size=1))
    other = pb.ListNotificationsRequest.Filter(category="account")
    resume = await anext(aiter(api.stub.WatchNotifications(pb.WatchNotificationsRequest(earliest=EMPTY))))
    calls: list[Any] = [
        api.stub.ListNotifications(pb.ListNotificationsRequest(page_token="?")),
        api.stub.ListNotifications(pb.ListNotificationsRequest(page_token=resume.resume_token)),
        api.stub.ListNotifications(pb.ListNotificationsRequest(page_token=page.next_page_token, filter=other)),
        api.stub.ListDeliveries(pb.ListDeliveriesRequest(page_token=page.next_page_token)),
        api.stub.ListNotifications(pb.ListNotificationsRequest(filter=pb.ListNotificationsRequest.Filter(user_id="x"))),
        api.stub.ListDeliveries(pb.ListDeliveriesRequest(page_size=-1)),
        api.stub.ListDeliveries(pb.ListDeliveriesRequest(filter=pb.ListDeliveriesRequest.Filter(state=9))),
    ]
    said = []
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        code, reason, fields = refusal(caught.value)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        said.append((reason, fields))
    assert said == [
        ("BAD_TOKEN", ["page_token"]),
        ("BAD_TOKEN", ["page_token"]),
        ("TOKEN_MISMATCH", ["page_token"]),
        ("TOKEN_MISMATCH", ["page_token"]),
        ("INVALID_FIELD", ["filter.user_id"]),
        ("INVALID_FIELD", []),
        ("INVALID_FIELD", ["filter.state"]),
    ]


async def test_the_inbox(api: Api, events: Events) -> None:
    empty = await api.stub.GetInbox(pb.GetInboxRequest())
    assert empty == pb.Inbox()
    await api.store(*(events.created(f"user{number}") for number in range(3)))
    state = await api.stub.GetInbox(pb.GetInboxRequest())
    assert (state.position, state.notifications, state.pending, state.delivered) == (3, 3, 3, 0)
    assert state.HasField("oldest_pending_time")


class Watcher:
    """Reads a stream and checks on the way that no position is passed over."""

    def __init__(self, api: Api, **request: object) -> None:
        self.call = api.stub.WatchNotifications(pb.WatchNotificationsRequest(**request))
        self._messages = aiter(self.call)
        self.position: int | None = None
        self.token = ""

    async def next(self) -> pb.WatchNotificationsResponse:
        message = await asyncio.wait_for(anext(self._messages), 5.0)
        assert self.position is None or message.previous_position == self.position
        self.position, self.token = message.position, message.resume_token
        return message

    async def until(self, position: int) -> list[int]:
        """The positions of the notifications up to one."""
        seen: list[int] = []
        while not seen or seen[-1] < position:
            seen += [one.position for one in (await self.next()).notifications]
        return seen


async def test_a_stream_from_the_beginning_goes_live(api: Api, events: Events) -> None:
    await api.store(*(events.created(f"user{number}") for number in range(5)))
    watcher = Watcher(api, earliest=EMPTY)
    first = await watcher.next()
    assert first.WhichOneof("mark") == "bookmark"
    assert (first.position, first.bookmark.head_position) == (0, 5)
    assert await watcher.until(5) == [1, 2, 3, 4, 5]
    assert (await watcher.next()).caught_up.position == 5
    await api.store(*(events.created(f"more{number}") for number in range(3)))
    assert await watcher.until(8) == [6, 7, 8]
    message = pb.Notification()
    message.CopyFrom((await api.stub.ListNotifications(pb.ListNotificationsRequest(page_size=1))).notifications[0])
    assert message.subject == "Welcome, more2"
    watcher.call.cancel()


async def test_streams_resume_where_they_were(api: Api, events: Events) -> None:
    await api.store(events.created("ada"))
    watcher = Watcher(api, now=EMPTY)
    assert (await watcher.next()).position == 1
    await api.store(events.created("bob"))
    assert await watcher.until(2) == [2]
    watcher.call.cancel()
    await api.store(*(events.created(f"user{number}") for number in range(1200)))
    again = Watcher(api, resume_token=watcher.token)
    assert (await again.next()).position == 2
    assert await again.until(1202) == list(range(3, 1203))
    again.call.cancel()


async def test_a_stream_of_one_user(api: Api, events: Events) -> None:
    ada = events.user("ada")
    watcher = Watcher(api, earliest=EMPTY, user_id=ada.id, bookmark_interval=duration_pb2.Duration(seconds=1))
    await watcher.next()
    await api.store(events.created("bob"), events.updated(ada, email="b@example.com"), events.created("eve"))
    assert await watcher.until(2) == [2]
    await api.store(events.deleted(ada))
    # Neither hers nor in-app: a bookmark says that they are passed.
    while (message := await watcher.next()).position < 4:
        assert not message.notifications
    assert not message.notifications
    watcher.call.cancel()
    for request in ({"user_id": ""}, {"user_id": str(uuid.uuid4())}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Watcher(api, resume_token=watcher.token, **request).next()
        assert refusal(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_MISMATCH")


async def test_streams_that_are_refused(api: Api, pool: Pool, events: Events) -> None:
    ahead = Watcher(api, earliest=EMPTY)
    await api.store(events.created("ada"))
    await ahead.until(1)
    ahead.call.cancel()
    await api.connection.execute("UPDATE inbox SET notification_position = 0")
    cases: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"resume_token": "AAAA"}, grpc.StatusCode.INVALID_ARGUMENT, "BAD_TOKEN"),
        ({"earliest": EMPTY, "user_id": "ada"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            {"now": EMPTY, "bookmark_interval": duration_pb2.Duration(seconds=301)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        ({"resume_token": ahead.token}, grpc.StatusCode.FAILED_PRECONDITION, "FUTURE_TOKEN"),
    ]
    for request, code, reason in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Watcher(api, **request).next()
        assert refusal(caught.value)[:2] == (code, reason)


async def test_drain_ends_streams_with_a_token(api: Api) -> None:
    watcher = Watcher(api, now=EMPTY)
    await watcher.next()
    await watcher.next()
    await api.streams.drain(2.0)
    message = await watcher.next()
    assert message.WhichOneof("mark") == "drain"
    assert message.resume_token
    assert message.drain.reason == "the server is shutting down"
    assert await watcher.call.code() is grpc.StatusCode.OK
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Watcher(api, now=EMPTY).next()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
