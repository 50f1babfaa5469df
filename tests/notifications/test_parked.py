"""Parked deliveries are replayed and discarded over a real gRPC connection, with a dispatcher at work."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from notification_service import lanes, rules
from notification_service.api.notifications import NotificationService
from notification_service.channels import Outcome
from notification_service.compose import Composer
from notification_service.domain import EMAIL, TRIES_EXHAUSTED, Ended, Operation, Result, State
from notification_service.inbox import Inbox
from notification_service.store import feed, outcomes, parked, reads
from notification_service.tail import Tail
from notification_service.templates import Templates
from notification_service.watch import Streams
from servicekit import callers, guard
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, Events, batch, eventually, explainer, write
from tests.notifications.test_dispatcher import FAST, LATER, OK, Scripted, lease, running
from tidings.client import ApiError, Notifications
from tidings.notifications.v1 import notifications_pb2 as pb
from tidings.notifications.v1 import notifications_pb2_grpc

CODE = grpc.StatusCode
REFUSED = Outcome(Result.REFUSED, 550, "no such mailbox")


def _operator(call: callers.Call) -> callers.Grant:
    return callers.Grant("operator", None)


@dataclass
class Api:
    stub: notifications_pb2_grpc.NotificationServiceAsyncStub
    connection: Connection
    client: Notifications
    woken: asyncio.Event

    async def all(self, **filters: Any) -> list[pb.Delivery]:
        return [one.delivery for one in await reads.list_deliveries(self.connection, filters, 1 << 62, 10_000)]

    async def states(self) -> dict[str, int]:
        inbox = await self.client.inbox()
        names = ("pending", "delivered", "parked", "discarded")
        return {name: count for name in names if (count := getattr(inbox, name))}


@pytest.fixture
async def api(pool: Pool, connection: Connection) -> AsyncIterator[Api]:
    server, woken = grpc.aio.server(), asyncio.Event()
    streams = Streams(
        pool, Tail(pool, 1.0), max_streams=1, max_streams_per_caller=1, max_stream_age=9, reconnect_spread=0
    )
    guard.add(
        server,
        _operator,
        notifications_pb2_grpc.add_NotificationServiceServicer_to_server,
        NotificationService(pool, streams, explainer(pool), woken.set),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: notifications_pb2_grpc.NotificationServiceAsyncStub = notifications_pb2_grpc.NotificationServiceStub(
            channel
        )
        yield Api(stub, connection, Notifications(channel), woken)
    await server.stop(0)


async def park(api: Api, composer: Composer, events: Events, count: int, tries: int = 1) -> list[pb.Delivery]:
    """So many deliveries that were given up after `tries` attempts."""
    made = [events.created(f"user{number}") for number in range(count)]
    inbox = Inbox(composer, lambda: None)
    await inbox.store(api.connection, await feed.read_cursor(api.connection), batch(*made))
    for number in range(1, tries + 1):
        leased = await lease(api.connection, count)
        state = State.PARKED if number == tries else State.PENDING
        ended = [Ended(one.id, one.number, Result.FAILED, 451, "later", state, 0.0) for one in leased]
        assert len(await outcomes.record(api.connection, ended)) == count
    return await api.all(state=State.PARKED)


def refusal(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Code, reason and metadata."""
    status = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return error.code(), info.reason, dict(info.metadata)


async def test_a_replay_is_tried_as_often_as_a_new_delivery(
    api: Api, pool: Pool, composer: Composer, events: Events
) -> None:
    (before,) = await park(api, composer, events, 1, tries=FAST.tries)
    channel = Scripted(LATER)
    async with running(pool, channel) as dispatcher:
        await asyncio.sleep(0.2)
        assert not channel.sent
        assert await api.client.replay([before.id], reason="the mail server is mended") == 1
        assert api.woken.is_set()
        dispatcher.wake()
        await eventually(lambda: len(channel.sent) == FAST.tries)
        parked_again: list[pb.Delivery] = []

        async def again() -> bool:
            parked_again[:] = await api.all(state=State.PARKED)
            return bool(parked_again)

        await eventually(again)
        (after,) = parked_again
        assert [one.number for one in after.attempts] == list(range(1, 2 * FAST.tries + 1))
        assert {message.idempotency_key for message in channel.sent} == {before.idempotency_key}
        channel.answers = [OK]
        assert await api.client.replay([before.id]) == 1
        dispatcher.wake()
        await eventually(lambda: len(channel.sent) == FAST.tries + 1)

        async def delivered() -> bool:
            return await api.states() == {"delivered": 1}

        await eventually(delivered)
    (last,) = await api.all()
    kinds = pb.Delivery.Operation
    assert [(one.kind, one.actor, one.reason) for one in last.operations] == [
        (kinds.REPLAYED, "operator", "the mail server is mended"),
        (kinds.REPLAYED, "operator", ""),
    ]
    assert before.end_time.ToDatetime() <= last.operations[0].time.ToDatetime() <= last.operations[1].time.ToDatetime()


async def test_the_last_try_without_an_answer_parks_a_replay_again(
    api: Api, composer: Composer, events: Events
) -> None:
    (one,) = await park(api, composer, events, 1, tries=3)
    await api.client.replay([one.id])
    assert await outcomes.park_exhausted(api.connection, EMAIL, 3, TRIES_EXHAUSTED) == []
    for number in (4, 5, 6):
        (leased,) = await lease(api.connection, seconds=0.0, tries=3)
        assert (leased.number, leased.turn) == (number, number - 3)
    assert await lease(api.connection, tries=3) == []
    assert [str(parked) for parked in await outcomes.park_exhausted(api.connection, EMAIL, 3, TRIES_EXHAUSTED)] == [
        one.id
    ]


async def test_an_attempt_from_before_a_replay_has_no_say(api: Api, composer: Composer, events: Events) -> None:
    made = events.created("ada")
    await Inbox(composer, lambda: None).store(api.connection, await feed.read_cursor(api.connection), batch(made))
    (slow,) = await lease(api.connection, seconds=0.0, tries=1)
    assert await outcomes.park_exhausted(api.connection, EMAIL, 1, TRIES_EXHAUSTED) == [slow.id]
    await api.client.replay([str(slow.id)])
    late = Ended(slow.id, slow.number, Result.FAILED, 0, "too late", State.PARKED, 0.0)
    assert await outcomes.record(api.connection, [late]) == set()
    assert await api.states() == {"pending": 1}


async def test_discarded_is_an_end(api: Api, pool: Pool, composer: Composer, events: Events) -> None:
    one, other = await park(api, composer, events, 2)
    assert await api.client.discard([one.id, one.id], reason="a test address") == 1
    assert await api.states() == {"parked": 1, "discarded": 1}
    channel = Scripted(OK)
    async with running(pool, channel):
        await asyncio.sleep(0.2)
    assert not channel.sent
    (found,) = [entry async for entry in api.client.deliveries(state=pb.Delivery.DISCARDED)]
    assert found.id == one.id
    assert found.end_time.ToDatetime() > one.end_time.ToDatetime()
    assert [(done.kind, done.reason) for done in found.operations] == [
        (pb.Delivery.Operation.DISCARDED, "a test address")
    ]
    (left,) = await api.all(state=State.PARKED)
    assert (left.id, list(left.operations)) == (other.id, [])


async def test_refused_calls_change_nothing(api: Api, composer: Composer, events: Events) -> None:
    parked_one, pending = await park(api, composer, events, 2)
    await api.client.replay([pending.id])
    stranger = str(uuid.uuid4())
    before = await api.all()
    for call, kind in (
        (api.stub.ReplayDeliveries, pb.ReplayDeliveriesRequest),
        (api.stub.DiscardDeliveries, pb.DiscardDeliveriesRequest),
    ):
        cases: list[tuple[Any, tuple[grpc.StatusCode, str, dict[str, str]]]] = [
            (kind(ids=[parked_one.id, stranger, pending.id]), (CODE.NOT_FOUND, "UNKNOWN_DELIVERY", {"ids": stranger})),
            (kind(ids=[parked_one.id, pending.id]), (CODE.FAILED_PRECONDITION, "NOT_PARKED", {"ids": pending.id})),
            *(
                (request, (CODE.INVALID_ARGUMENT, "INVALID_FIELD", {}))
                for request in (
                    kind(),
                    kind(reason="neither"),
                    kind(ids=[parked_one.id], filter=kind.Filter()),
                    kind(ids=[parked_one.id, "x"]),
                    kind(ids=[parked_one.id] * 1001),
                    kind(ids=[parked_one.id], reason="é" * 501),
                    kind(ids=[parked_one.id], reason="\0"),
                    kind(filter=kind.Filter(user_id="x")),
                )
            ),
        ]
        for request, expected in cases:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            assert refusal(caught.value) == expected, request
    assert await api.all() == before
    many = [str(uuid.uuid4()) for _ in range(1000)]
    with pytest.raises(grpc.aio.AioRpcError, match="and 990 more"):
        await api.stub.ReplayDeliveries(pb.ReplayDeliveriesRequest(ids=many, reason="é" * 500))


async def test_bulk_by_filter_touches_what_matches(api: Api, composer: Composer, events: Events) -> None:
    made = await park(api, composer, events, 5)
    kind = pb.DiscardDeliveriesRequest
    one = made[0]
    for filters, count in (
        ({"channel": "webhook"}, 0),
        ({"user_id": one.user_id, "notification_id": made[1].notification_id}, 0),
        ({"user_id": one.user_id, "channel": "email"}, 1),
        ({"notification_id": made[1].notification_id}, 1),
        ({}, 3),
        ({}, 0),
    ):
        answer = await api.stub.DiscardDeliveries(kind(filter=kind.Filter(**filters)))
        assert answer.discarded == count, filters
    assert await api.states() == {"discarded": 5}


async def test_bulk_goes_page_by_page_and_beside_others(
    api: Api, pool: Pool, composer: Composer, events: Events
) -> None:
    await park(api, composer, events, 250)
    operations = (*Operation, *Operation)
    connected = asyncio.Barrier(len(operations))

    async def work(operation: Operation) -> int:
        async with pool.connection() as connection:
            # Whoever came much earlier would do it all alone.
            await connected.wait()
            return await parked.change_all(connection, operation, {}, actor="", reason="", page=20)

    counts = await asyncio.gather(*map(work, operations))
    assert sum(counts) == 250
    assert all(count < 250 for count in counts)
    made = await api.all()
    assert {len(one.operations) for one in made} == {1}
    by_state = {
        pb.Delivery.PENDING: pb.Delivery.Operation.REPLAYED,
        pb.Delivery.DISCARDED: pb.Delivery.Operation.DISCARDED,
    }
    assert all(one.operations[0].kind == by_state[one.state] for one in made)


async def test_a_repeat_by_ids_is_told_so_and_does_nothing(
    api: Api, pool: Pool, composer: Composer, events: Events
) -> None:
    made = await park(api, composer, events, 10)
    request = pb.ReplayDeliveriesRequest(ids=[one.id for one in made])
    answers = await asyncio.gather(*(api.stub.ReplayDeliveries(request) for _ in range(5)), return_exceptions=True)
    done = [one for one in answers if isinstance(one, pb.ReplayDeliveriesResponse)]
    assert [one.replayed for one in done] == [10]
    for error in answers:
        if isinstance(error, grpc.aio.AioRpcError):
            assert refusal(error)[:2] == (CODE.FAILED_PRECONDITION, "NOT_PARKED")
    channel = Scripted(OK)
    async with running(pool, channel):
        await eventually(lambda: len(channel.sent) == 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.stub.ReplayDeliveries(request)
        assert "is DELIVERED" in str(caught.value.details()) or "is PENDING" in str(caught.value.details())
        await asyncio.sleep(0.2)
    assert len(channel.sent) == 10


async def test_what_could_not_be_composed_can_only_be_discarded(api: Api, events: Events, tmp_path: Path) -> None:
    for name in ("t.subject.txt", "t.txt", "t.html"):
        write(tmp_path / name, "{{ user.labels.tier }}")
    text = '[[rules]]\nname="r"\non=["CREATED"]\ntemplate="t"\ncategory="c"\nchannels=["email"]\n'
    composer = Composer(rules.load(write(tmp_path / "r.toml", text)), Templates(tmp_path), lanes.writers(SENDER, ()))
    await Inbox(composer, lambda: None).store(
        api.connection, await feed.read_cursor(api.connection), batch(events.created("ada"))
    )
    (one,) = await api.all(state=State.PARKED)
    with pytest.raises(ApiError) as caught:
        await api.client.replay([one.id])
    assert (caught.value.code, caught.value.reason) == (CODE.FAILED_PRECONDITION, "NOTHING_TO_SEND")
    assert await api.client.replay_all() == 0
    assert await api.client.discard_all(channel="email") == 1
    assert await api.states() == {"discarded": 1}
