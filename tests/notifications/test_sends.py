"""Sends over a real gRPC connection, made by the sender on a real Postgres; the copy of the users is put there."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from uuid_utils.compat import uuid7

from notification_service import lanes
from notification_service.api.notifications import NotificationService
from notification_service.api.sends import SendService
from notification_service.compose import Composer
from notification_service.destinations import Destination
from notification_service.domain import Cursor, Hold, Order, Person
from notification_service.inbox import Inbox
from notification_service.sender import Sender
from notification_service.store import audience, feed, sends
from notification_service.store import recipients as copy
from notification_service.store import shards as leases
from notification_service.store.recipients import Deletion, Held, Named
from notification_service.store.sends import DeletedMeanwhileError, TurnLostError
from notification_service.tail import Tail
from notification_service.templates import Templates
from notification_service.watch import Streams
from servicekit import callers, database, guard
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, TRACE_PARENT, Events, batch, eventually, explainer, write
from tests.users.calls import refused
from tidings.client import shard_of
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc, sends_pb2_grpc
from tidings.notifications.v1 import sends_pb2 as pb
from tidings.users.v1 import users_pb2

LOG = uuid.UUID(int=7)
NEWS = {
    "news.subject.txt": "News for {{ name }}",
    "news.txt": "{{ params.what }} in {{ user.labels.city | default('town') }}",
    "news.html": "<p>{{ params.what }}</p>",
    "news.de.subject.txt": "Neues, {{ name }}",
    "news.de.txt": "{{ params.what }}",
    "news.de.html": "<p>{{ params.what }}</p>",
    "bare.subject.txt": "Bare",
    "bare.txt": "Bare",
}
HOOK = Destination(
    uuid.UUID(int=9), "crm", "https://crm.example.com", "https://crm.example.com", (), events=frozenset({"SENT"})
)
# It wants to hear of something else.
OTHER = Destination(
    uuid.UUID(int=8), "hr", "https://hr.example.com", "https://hr.example.com", (), events=frozenset({"CREATED"})
)


@dataclass
class World:
    """A service's parts that have to do with sends."""

    stub: sends_pb2_grpc.SendServiceAsyncStub
    lists: notifications_pb2_grpc.NotificationServiceAsyncStub
    sender: Sender
    pool: Pool
    connection: Connection
    composer: Composer
    templates_dir: Path
    held: Held
    head: tuple[uuid.UUID, int] = (LOG, 1)

    async def know(self, *people: Person) -> None:
        """The copy of the users has these, too, and is as new as the feed."""
        named = [Named(one.user_id, one.version, one) for one in people]
        await self._store(named)

    async def _store(self, named: list[Named]) -> None:
        self.held = await copy.store(
            self.connection,
            self.held,
            named,
            token=str(uuid.uuid4()),
            lease=600.0,
            head_position=self.head[1],
            position=self.head[1],
            part="end" if self.held.position is None else None,
            log_id=LOG,
        )

    async def catch_up(self) -> None:
        """The copy is as new as the feed."""
        await self._store([])

    async def send(self, *ids: uuid.UUID, request_id: str | None = None, **fields: Any) -> pb.Send:
        return await self.stub.SendNotification(request(*ids, request_id=request_id, **fields))

    async def get(self, send: pb.Send) -> pb.Send:
        return await self.stub.GetSend(pb.GetSendRequest(id=send.id))

    async def ended(self, send: pb.Send) -> pb.Send:
        """The send once it is at its end."""

        async def is_ended() -> bool:
            try:
                found = await self.get(send)
            except grpc.aio.AioRpcError as error:
                # One of the pool's connections was broken.
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            return found.state in (pb.Send.SENT, pb.Send.CANCELLED, pb.Send.FAILED)

        await eventually(is_ended)
        return await self.get(send)

    async def notifications(self, send: pb.Send) -> list[notifications_pb2.Notification]:
        asked = notifications_pb2.ListNotificationsRequest(filter={"send_id": send.id}, page_size=1000)
        return list((await self.lists.ListNotifications(asked)).notifications)

    async def deliveries(self) -> list[notifications_pb2.Delivery]:
        asked = notifications_pb2.ListDeliveriesRequest(page_size=1000)
        return list((await self.lists.ListDeliveries(asked)).deliveries)


_names = itertools.count(1)


def person(name: str = "", **fields: Any) -> Person:
    name = name or f"person{next(_names)}"
    made = Person(uuid.UUID(str(uuid7())), 1, name, f"{name}@example.com", name.title(), "", "", {}, None, None)
    return replace(made, **fields)


def request(*ids: uuid.UUID, request_id: str | None = None, **fields: Any) -> pb.SendNotificationRequest:
    validate_only = fields.pop("validate_only", False)
    to = {"filter": fields.pop("filter")} if "filter" in fields else {"user_ids": {"ids": [str(one) for one in ids]}}
    given = {"template": "news", "category": "news", "channels": ["email", "in_app"], "params": {"what": "Rain"}}
    return pb.SendNotificationRequest(
        send=pb.Send(**{**given, "recipients": to, **fields}),
        request_id=str(uuid.uuid4()) if request_id is None else request_id,
        validate_only=validate_only,
    )


def by_metadata(call: callers.Call) -> callers.Grant:
    """Names a caller by what it says; the services go by tokens."""
    found = dict(call.invocation_metadata())
    return callers.Grant(str(found.get("caller", "")), None)


@pytest.fixture
async def world(pool: Pool, connection: Connection, tmp_path: Path) -> AsyncIterator[World]:
    for name, text in NEWS.items():
        write(tmp_path / name, text)
    await feed.read_cursor(connection)
    composer = Composer((), Templates(tmp_path), lanes.writers(SENDER, (HOOK, OTHER)))
    sender = Sender(pool, composer, lambda: None, turn=2.0, poll_interval=0.05)
    server = grpc.aio.server()
    streams = Streams(
        pool, Tail(pool, 0.05), max_streams=1, max_streams_per_caller=1, max_stream_age=1800.0, reconnect_spread=3.0
    )

    async def head() -> tuple[uuid.UUID, int]:
        return made.head

    for add, servicer in (
        (sends_pb2_grpc.add_SendServiceServicer_to_server, SendService(pool, composer, head, sender.wake)),
        (
            notifications_pb2_grpc.add_NotificationServiceServicer_to_server,
            NotificationService(pool, streams, explainer(pool), lambda: None),
        ),
    ):
        guard.add(server, by_metadata, add, servicer)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    held = await copy.take(connection, uuid.uuid4(), 600.0)
    assert held is not None
    loop = asyncio.create_task(sender.run())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        made = World(
            sends_pb2_grpc.SendServiceStub(channel),
            notifications_pb2_grpc.NotificationServiceStub(channel),
            sender,
            pool,
            connection,
            composer,
            tmp_path,
            held,
        )
        yield made
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    await server.stop(None)


async def test_a_send_to_ids_tells_what_became_of_each(world: World) -> None:
    ada, bob = person("ada", locale="de-AT", time_zone="Europe/Vienna"), person("bob", labels={"city": "Rome"})
    silent, gone, strangers = person("silent", email=""), person("gone"), [uuid.uuid4() for _ in range(2)]
    await world.know(ada, bob, silent, gone)
    await copy.bury(world.connection, {gone.user_id: Deletion(1, 2)})
    ids = [ada.user_id, bob.user_id, silent.user_id, gone.user_id, *strangers, ada.user_id]
    sent = await world.stub.SendNotification(
        request(*ids, channels=["email", "webhook"]), metadata=(("caller", "shop"), ("traceparent", TRACE_PARENT))
    )
    assert (sent.state, sent.actor, sent.recipients.user_ids.total) == (pb.Send.SCHEDULED, "shop", 6)
    assert sent.trace_parent.split("-")[1] == TRACE_PARENT.split("-")[1]
    done = await world.ended(sent)
    assert done.state == pb.Send.SENT
    # Who has no address is told to the webhook all the same.
    assert done.counts == pb.Send.Counts(matched=6, made=3, unknown=2, deleted=1)
    assert set(done.unknown_user_ids) == {str(one) for one in strangers}
    assert done.create_time.ToDatetime() <= done.start_time.ToDatetime() <= done.end_time.ToDatetime()
    notes = {one.user_id: one for one in await world.notifications(sent)}
    assert notes.keys() == {str(one.user_id) for one in (ada, bob, silent)}
    note = notes[str(ada.user_id)]
    assert (note.event_id, note.event_position, note.rule, note.send_id) == ("", 0, "", sent.id)
    assert (note.category, note.template, note.locale) == ("news", "news", "de")
    assert note.trace_parent == sent.trace_parent
    assert sorted(one.position for one in notes.values()) == [1, 2, 3]
    made = await world.deliveries()
    assert {one.event_id for one in made} == {""}
    assert sorted((one.channel, one.target) for one in made) == [
        ("email", "ada@example.com"),
        ("email", "bob@example.com"),
        *[("webhook", HOOK.url)] * 3,
    ]
    [content] = await (
        await world.connection.execute(
            "SELECT content FROM contents JOIN deliveries ON id = delivery_id WHERE target = 'bob@example.com'"
        )
    ).fetchall()
    assert json.loads(content[0])["text"] == "Rain in Rome\n"
    rows = await (
        await world.connection.execute(
            "SELECT content FROM contents JOIN deliveries ON id = delivery_id WHERE channel = 'webhook'"
        )
    ).fetchall()
    said = {one["data"]["user"]["username"]: one for one in (json.loads(row[0]) for row in rows)}
    assert said.keys() == {"ada", "bob", "silent"}
    assert said["ada"]["type"] == "notification.sent"
    assert said["ada"]["data"]["send"] == {
        "id": sent.id, "template": "news", "actor": "shop", "params": {"what": "Rain"}
    }  # fmt: skip


async def test_who_has_no_address_and_no_other_channel_is_counted(world: World) -> None:
    silent = person("silent", email="")
    await world.know(silent)
    done = await world.ended(await world.send(silent.user_id, channels=["email"]))
    assert (done.state, done.counts) == (pb.Send.SENT, pb.Send.Counts(matched=1, no_address=1))
    assert await world.notifications(done) == []
    done = await world.ended(await world.send(silent.user_id, channels=["email", "in_app"]))
    [note] = await world.notifications(done)
    assert (list(note.channels), note.subject, note.body) == (["in_app"], "News for Silent", "Rain in town\n")


async def test_filters(world: World) -> None:
    people = [
        person("ada", locale="de", labels={"plan": "gold", "city": "Rome"}),
        person("alan", locale="de-AT", labels={"plan": "gold"}),
        person("bob", locale="den", labels={"plan": "free"}),
        person("ALBA", email="AL@Example.org", locale="en"),
        person("gone"),
    ]
    await world.know(*people)
    await copy.bury(world.connection, {people[-1].user_id: Deletion(1, 2)})
    found: dict[str, str] = {}
    asked: dict[str, dict[str, Any]] = {
        "all": {"all": True},
        "label": {"labels": {"plan": "gold"}},
        "labels": {"labels": {"plan": "gold", "city": "Rome"}},
        "locale": {"locale": "DE"},
        "username": {"username_prefix": "al"},
        "email": {"email_prefix": "al"},
        "two": {"email_prefix": "a", "labels": {"plan": "gold"}},
        "none": {"username_prefix": "%"},
    }
    for name, filter_ in asked.items():
        counted = await world.send(filter=filter_, channels=["webhook"], validate_only=True)
        assert (counted.id, counted.state) == ("", pb.Send.STATE_UNSPECIFIED)
        done = await world.ended(await world.send(filter=filter_, channels=["webhook"]))
        assert (done.state, done.counts.made) == (pb.Send.SENT, counted.counts.matched)
        ids = {one.user_id for one in await world.notifications(done)}
        found[name] = " ".join(sorted(one.username for one in people if str(one.user_id) in ids))
        if filter_ != {"all": True}:
            assert done.recipients.filter == pb.Send.Filter(**filter_)
    assert found == {
        "all": "ALBA ada alan bob",
        "label": "ada alan",
        "labels": "ada",
        "locale": "ada alan",
        "username": "alan",
        "email": "ALBA alan",
        "two": "ada alan",
        "none": "",
    }


async def test_a_request_is_made_once(world: World) -> None:
    ada = person("ada")
    await world.know(ada)
    key = str(uuid.uuid4())
    answers = await asyncio.gather(*(world.send(ada.user_id, request_id=key) for _ in range(4)))
    assert len({one.id for one in answers}) == 1
    await world.ended(answers[0])
    # Also when the template is no more.
    for name in NEWS:
        (world.templates_dir / name).unlink()
    world.composer.templates.reload([])
    again = await world.send(ada.user_id, request_id=key)
    assert (again.id, again.state) == (answers[0].id, pb.Send.SENT)
    assert len(await world.notifications(again)) == 1
    for changed in ({"params": {"what": "Snow"}}, {"category": "other"}, {"filter": {"all": True}}):
        refusal = await refused(world.send(ada.user_id, request_id=key, **changed))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    # Another caller has keys of its own.
    refusal = await refused(
        world.stub.SendNotification(request(ada.user_id, request_id=key), metadata=(("caller", "other"),))
    )
    assert refusal.reason == "UNKNOWN_TEMPLATE"


WRONG: tuple[tuple[dict[str, Any], list[str]], ...] = (
    ({"template": ""}, ["send.template"]),
    ({"template": "No"}, ["send.template"]),
    ({"category": "*"}, ["send.category"]),
    ({"channels": []}, ["send.channels"]),
    ({"channels": ["email", "sms"]}, ["send.channels[1]"]),
    ({"channels": ["email", "email"]}, ["send.channels"]),
    ({"params": {"a": "x" * 16_001}}, ["send.params"]),
    ({"params": {"a": "\0"}}, ["send.params"]),
    ({"params": {"a": float("nan")}}, ["send.params"]),
    ({"recipients": {}}, ["send.recipients"]),
    ({"recipients": {"user_ids": {}}}, ["send.recipients.user_ids.ids"]),
    ({"recipients": {"user_ids": {"ids": ["1", str(uuid.uuid4())]}}}, ["send.recipients.user_ids.ids[0]"]),
    (
        {"recipients": {"user_ids": {"ids": [str(uuid.uuid4()) for _ in range(1001)]}}},
        ["send.recipients.user_ids.ids"],
    ),
    ({"filter": {}}, ["send.recipients.filter"]),
    ({"filter": {"all": True, "locale": "de"}}, ["send.recipients.filter.all"]),
    ({"filter": {"labels": {"": "x"}}}, ["send.recipients.filter.labels"]),
    ({"filter": {"email_prefix": "a\0"}}, ["send.recipients.filter.email_prefix"]),
    ({"send_time": {"seconds": 4_000_000_000}}, ["send.send_time"]),
    ({"request_id": "", "template": ""}, ["request_id", "send.template"]),
)


async def test_wrong_fields_are_named(world: World) -> None:
    for fields, named in WRONG:
        refusal = await refused(world.send(uuid.uuid4(), **fields))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert refusal.fields == named


async def test_what_the_template_lacks_is_refused_at_the_call(world: World) -> None:
    ada = person("ada")
    await world.know(ada)
    refusal = await refused(world.send(ada.user_id, template="absent"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_TEMPLATE")
    refusal = await refused(world.send(ada.user_id, params={}))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TEMPLATE_FAILED")
    assert "what" in refusal.message
    # It has no HTML, which only mails need.
    refusal = await refused(world.send(ada.user_id, template="bare"))
    assert refusal.reason == "TEMPLATE_FAILED"
    done = await world.ended(await world.send(ada.user_id, template="bare", channels=["in_app"]))
    assert done.counts.made == 1


async def test_a_template_that_is_gone_when_it_is_due_fails_the_send(world: World) -> None:
    ada = person("ada")
    await world.know(ada)
    later = datetime.now(UTC) + timedelta(hours=1)
    sent = [
        await world.send(ada.user_id, send_time=later),
        await world.send(ada.user_id, template="bare", channels=["in_app"], send_time=later),
    ]
    write(world.templates_dir / "news.txt", "{{ params.other }}")
    (world.templates_dir / "bare.txt").unlink()
    (world.templates_dir / "bare.subject.txt").unlink()
    world.composer.templates.reload([])
    await world.connection.execute("UPDATE sends SET send_time = now()")
    failed = [await world.ended(one) for one in sent]
    assert [one.state for one in failed] == [pb.Send.FAILED] * 2
    assert [one.failure.partition(":")[0] for one in failed] == ["TEMPLATE_FAILED", "UNKNOWN_TEMPLATE"]
    assert await world.deliveries() == []


async def test_a_send_waits_for_its_time_and_is_never_sent_once_cancelled(world: World) -> None:
    ada = person("ada")
    await world.know(ada)
    later = datetime.now(UTC) + timedelta(hours=1)
    sent, cancelled = [await world.send(ada.user_id, send_time=later) for _ in range(2)]
    done = await world.stub.CancelSend(pb.CancelSendRequest(id=cancelled.id))
    again = await world.stub.CancelSend(pb.CancelSendRequest(id=cancelled.id))
    assert (done.state, again) == (pb.Send.CANCELLED, done)
    # What is due meanwhile overtakes it.
    await world.ended(await world.send(ada.user_id))
    assert (await world.get(sent)).state == pb.Send.SCHEDULED
    await world.connection.execute("UPDATE sends SET send_time = now()")
    assert (await world.ended(sent)).state == pb.Send.SENT
    assert await world.notifications(cancelled) == []
    assert (await world.get(cancelled)).state == pb.Send.CANCELLED
    refusal = await refused(world.stub.CancelSend(pb.CancelSendRequest(id=str(uuid.uuid4()))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SEND")


async def test_cancelling_ends_what_is_pending_and_what_was_on_its_way_when_it_is_not(world: World) -> None:
    people = [person() for _ in range(3)]
    await world.know(*people)
    sent = await world.ended(await world.send(*(one.user_id for one in people), channels=["email"]))
    by_target = {one.target: one.id for one in await world.deliveries()}
    delivered, flying = (by_target[one.email] for one in people[:2])
    await world.connection.execute(
        "UPDATE deliveries SET state = 2, end_time = now(), next_attempt_time = NULL WHERE id = %s", (delivered,)
    )
    await world.connection.execute(
        "UPDATE deliveries SET lease_until = now() + interval '1 hour' WHERE id = %s", (flying,)
    )
    done = await world.stub.CancelSend(pb.CancelSendRequest(id=sent.id))
    assert done.state == pb.Send.CANCELLED

    async def states() -> dict[str, tuple[str, str]]:
        name = notifications_pb2.Delivery.State.Name
        return {one.target: (name(one.state), one.end_reason) for one in await world.deliveries()}

    expected = {
        people[0].email: ("DELIVERED", ""),
        people[1].email: ("PENDING", ""),
        people[2].email: ("CANCELLED", "SEND_CANCELLED"),
    }
    assert await states() == expected
    # The attempt has ended without success: it is not tried again.
    await world.connection.execute("UPDATE deliveries SET lease_until = now() WHERE id = %s", (flying,))

    async def is_settled() -> bool:
        row = await (await world.connection.execute("SELECT settled FROM sends")).fetchone()
        return row is not None and bool(row[0])

    await eventually(is_settled)
    assert await states() == expected | {people[1].email: ("CANCELLED", "SEND_CANCELLED")}


def hands(world: World) -> Callable[[], Awaitable[Order]]:
    """Takes turns by hand, instead of the sender."""

    async def turn() -> Order:
        order = await sends.take(world.connection, 600.0)
        assert order is not None
        return order

    return turn


async def test_a_page_is_stored_by_the_newest_turn_and_before_a_cancellation_only(world: World) -> None:
    people = [person() for _ in range(2)]
    await world.know(*people)
    world.sender.drain()
    sent = await world.send(*(one.user_id for one in people))
    turn = hands(world)
    lost = await turn()
    assert await sends.take(world.connection, 600.0) is None
    await world.connection.execute("UPDATE sends SET lease_until = now()")
    mine = await turn()
    page = await world.sender._composed(mine, await _found(world, mine), world.composer.templates.current)
    with pytest.raises(TurnLostError):
        await sends.advance(world.connection, lost, page)
    await world.stub.CancelSend(pb.CancelSendRequest(id=sent.id))
    with pytest.raises(TurnLostError):
        await sends.advance(world.connection, mine, page)
    assert await world.notifications(sent) == []


async def _found(world: World, order: Order) -> Any:
    from notification_service import sender

    return await sender._read(world.connection, order)


async def test_a_user_who_is_deleted_while_the_page_is_composed_is_not_sent_to(world: World, events: Events) -> None:
    ada, bob = person("ada"), person("bob")
    await world.know(ada, bob)
    world.sender.drain()
    sent = await world.send(ada.user_id, bob.user_id, channels=["email"])
    order = await hands(world)()
    page = await world.sender._composed(order, await _found(world, order), world.composer.templates.current)
    assert len(page.made) == 2
    await Inbox(world.composer, lambda: None).store(
        world.connection, await feed.read_cursor(world.connection), batch(deletion(events, ada))
    )
    with pytest.raises(DeletedMeanwhileError):
        await sends.advance(world.connection, order, page)
    assert await world.deliveries() == []
    await world.sender._expand(order)
    done = await world.get(sent)
    assert (done.state, done.counts) == (pb.Send.SENT, pb.Send.Counts(matched=2, made=1, deleted=1))
    assert [one.target for one in await world.deliveries()] == [bob.email]


@pytest.mark.parametrize("shards", [1, 2])
async def test_a_deletion_while_a_page_is_stored_cancels_what_it_made(
    world: World, events: Events, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    ada = person("ada")
    await world.know(ada)
    world.sender.drain()
    await leases.divide(world.connection, await leases.look(world.connection), shards)
    holds = await leases.take(world.connection, uuid.uuid4(), (await leases.look(world.connection)).shards)
    [hold] = [one for one in holds if one.shard == shard_of(str(ada.user_id), shards)]
    await world.send(ada.user_id, channels=["email"])
    order = replace(await hands(world)(), as_of=0)
    looked, goes_on = asyncio.Event(), asyncio.Event()
    living = audience.living

    async def held_up(connection: Connection, ids: Any) -> set[uuid.UUID]:
        found = await living(connection, ids)
        looked.set()
        await goes_on.wait()
        return found

    monkeypatch.setattr(audience, "living", held_up)
    expanding = asyncio.create_task(world.sender._expand(order))
    await looked.wait()
    # The page is stored, found to be good, and not committed.
    cursor = await feed.read_shard(world.connection, hold)
    assert cursor is not None
    deleting = asyncio.create_task(_delete(world, cursor, deletion(events, ada), hold))

    async def waits() -> bool:
        found = await (
            await world.connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        ).fetchone()
        return found is not None and found[0] > 0

    await eventually(lambda: deleting.done() or waits())
    goes_on.set()
    await asyncio.gather(expanding, deleting)
    [delivery] = await world.deliveries()
    assert (delivery.state, delivery.end_reason) == (notifications_pb2.Delivery.CANCELLED, "USER_DELETED")


async def _delete(world: World, cursor: Cursor, event: users_pb2.UserEvent, hold: Hold) -> None:
    async with world.pool.connection() as connection:
        await Inbox(world.composer, lambda: None).store(connection, cursor, batch(event), hold)


async def test_a_later_deletion_cancels_what_is_pending_of_a_send(world: World, events: Events) -> None:
    ada = person("ada")
    # The copy is as of position 1. Of the deletion at 1 ada has come back since, that at 2 is news.
    await world.know(ada)
    await world.ended(await world.send(ada.user_id, channels=["email"]))
    outcomes = []
    for _ in range(2):
        await Inbox(world.composer, lambda: None).store(
            world.connection, await feed.read_cursor(world.connection), batch(deletion(events, ada))
        )
        [delivery] = await world.deliveries()
        outcomes.append((delivery.state, delivery.end_reason))
    state = notifications_pb2.Delivery
    assert outcomes == [(state.PENDING, ""), (state.CANCELLED, "USER_DELETED")]


def deletion(events: Events, of: Person) -> users_pb2.UserEvent:
    return events.deleted(users_pb2.User(id=str(of.user_id), username=of.username, version=of.version + 1))


async def test_a_send_waits_for_the_copy_to_be_as_new_as_the_feed_was(world: World) -> None:
    ada = person("ada")
    await world.know(person("bob"))
    # The feed is ahead of the copy by ada.
    world.head = (LOG, 5)
    sent = await world.send(ada.user_id, channels=["in_app"])
    bound = await world.send(ada.user_id, channels=["in_app"], params={"what": "Snow"})
    await world.connection.execute(
        "UPDATE sends SET create_time = now() - interval '31 seconds', send_time = now() - interval '31 seconds'"
        " WHERE id = %s",
        (bound.id,),
    )
    # For one that has waited long the copy is as it is.
    assert (await world.ended(bound)).counts == pb.Send.Counts(matched=1, unknown=1)
    assert (await world.get(sent)).state == pb.Send.SCHEDULED
    await world.know(ada)
    assert (await world.ended(sent)).counts == pb.Send.Counts(matched=1, made=1)


async def test_a_copy_that_is_not_whole_is_never_sent_by(world: World) -> None:
    ada = person("ada")
    sent = await world.send(filter={"all": True})
    await world.connection.execute(
        "UPDATE sends SET create_time = now() - interval '1 day', send_time = now() - interval '1 day'"
    )
    assert await sends.take(world.connection, 600.0) is None
    assert (await world.get(sent)).state == pb.Send.SCHEDULED
    await world.know(ada)
    assert (await world.ended(sent)).counts.made == 1


async def test_why_somebody_got_one_or_did_not_is_explained(world: World) -> None:
    ada, bob, gone, silent = person("ada", labels={"plan": "gold"}), person("bob"), person("gone"), person("", email="")
    await world.know(ada, bob, gone, silent)
    await copy.bury(world.connection, {gone.user_id: Deletion(1, 2)})
    step = notifications_pb2.ExplainDeliveryResponse.Step

    async def told(send: pb.Send, user_id: uuid.UUID, notification_id: str = "") -> list[tuple[str, str]]:
        asked = notifications_pb2.ExplainDeliveryRequest(user_id=str(user_id))
        if notification_id:
            asked.notification_id = notification_id
        else:
            asked.send_id = send.id
        steps = (await world.lists.ExplainDelivery(asked)).steps
        return [(step.Kind.Name(one.kind), one.verdict) for one in steps]

    stranger = uuid.uuid4()
    ids = await world.ended(await world.send(ada.user_id, gone.user_id, silent.user_id, stranger, channels=["email"]))
    for user_id, verdict in (
        (bob.user_id, "NOT_NAMED"),
        (gone.user_id, "DELETED"),
        (silent.user_id, "NO_ADDRESS"),
        (stranger, "UNKNOWN"),
    ):
        assert await told(ids, user_id) == [("SEND", verdict)]
    expected = [("SEND", "MADE"), ("NOTIFICATION", "MADE"), ("PREFERENCE", "ON"), ("OUTLOOK", "DUE")]
    assert await told(ids, ada.user_id) == expected
    [note] = await world.notifications(ids)
    assert await told(ids, ada.user_id, note.id) == expected
    gold = await world.ended(await world.send(filter={"labels": {"plan": "gold"}}, channels=["in_app"]))
    assert await told(gold, bob.user_id) == [("SEND", "NOT_MATCHED")]
    assert await told(gold, ada.user_id) == [("SEND", "MADE"), ("NOTIFICATION", "MADE"), ("CHANNEL", "SHOWN")]
    # It is over, and known to be past everybody.
    await world.stub.CancelSend(pb.CancelSendRequest(id=gold.id))
    assert await told(gold, bob.user_id) == [("SEND", "NOT_MATCHED")]
    later = await world.send(filter={"all": True}, send_time=datetime.now(UTC) + timedelta(hours=1))
    assert await told(later, ada.user_id) == [("SEND", "WAITING")]
    await world.stub.CancelSend(pb.CancelSendRequest(id=later.id))
    assert await told(later, ada.user_id) == [("SEND", "CANCELLED")]
    refusal = await refused(told(pb.Send(id=str(stranger)), ada.user_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SEND")


async def test_lists_have_pages_and_filters_and_leave_out_what_is_long(world: World) -> None:
    ada = person("ada")
    await world.know(ada)
    made = []
    for number in range(5):
        sent = await world.stub.SendNotification(
            request(ada.user_id, category="odd" if number % 2 else "even"),
            metadata=(("caller", "shop" if number < 3 else "crm"),),
        )
        made.append((await world.ended(sent)).id)
    await world.stub.CancelSend(pb.CancelSendRequest(id=made[0]))

    async def listed(**fields: Any) -> list[str]:
        asked = pb.ListSendsRequest(page_size=2, filter=fields)
        found: list[str] = []
        while True:
            page = await world.stub.ListSends(asked)
            assert len(page.sends) <= 2
            for one in page.sends:
                assert (len(one.params), len(one.recipients.user_ids.ids)) == (0, 0)
                assert one.recipients.user_ids.total == 1
            found += [one.id for one in page.sends]
            if not page.next_page_token:
                return found
            asked.page_token = page.next_page_token

    assert await listed() == made[::-1]
    assert await listed(category="odd") == [made[3], made[1]]
    assert await listed(actor="shop") == made[2::-1]
    assert await listed(actor="shop", state=pb.Send.SENT) == [made[2], made[1]]
    refusal = await refused(world.stub.ListSends(pb.ListSendsRequest(filter={"state": 77})))
    assert refusal.fields == ["filter.state"]
    assert await sends.standing(world.connection) == {
        "scheduled": 0, "sending": 0, "sent": 4, "cancelled": 1, "failed": 0
    }  # fmt: skip


async def test_connections_that_break_double_and_lose_nothing(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from notification_service import sender as module

    monkeypatch.setattr(module, "_PAGE", 5)
    people = [person() for _ in range(60)]
    await world.know(*people)
    sent = await world.send(filter={"all": True}, channels=["in_app"])
    async with await database.connect(url, "breaks") as breaks:
        for count in (5, 25, 45):

            async def reached(count: int = count) -> bool:
                row = await (await breaks.execute("SELECT count(*) FROM notifications")).fetchone()
                return row is not None and row[0] >= count

            await eventually(reached)
            await breaks.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'tests' AND pid != %s",
                (world.connection.info.backend_pid,),
            )
    done = await world.ended(sent)
    assert (done.state, done.counts) == (pb.Send.SENT, pb.Send.Counts(matched=60, made=60))
    await world.pool.check()
    notes = await world.notifications(sent)
    assert sorted(one.position for one in notes) == list(range(1, 61))
    assert len({one.user_id for one in notes}) == 60


async def test_pages_go_on_where_the_last_one_ended_and_sends_take_turns(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from notification_service import sender as module

    monkeypatch.setattr(module, "_PAGE", 7)
    people = [person() for _ in range(40)]
    await world.know(*people)
    world.sender.drain()
    first = await world.send(filter={"all": True}, channels=["in_app"])
    second = await world.send(*(one.user_id for one in people), channels=["in_app"], params={"what": "Snow"})
    turns = []
    while (order := await sends.take(world.connection, 600.0)) is not None:
        turns.append(str(order.id))
        await world.sender._expand(order)
    assert turns[:4] == [first.id, second.id] * 2
    for one in (first, second):
        done = await world.get(one)
        assert (done.state, done.counts) == (pb.Send.SENT, pb.Send.Counts(matched=40, made=40))
        notes = await world.notifications(one)
        assert {note.user_id for note in notes} == {str(person.user_id) for person in people}
        assert len(notes) == 40


async def test_whom_a_template_fails_for_costs_the_others_of_a_page_nothing(world: World) -> None:
    write(world.templates_dir / "news.txt", "{{ params.what }}{% if name == 'Odd' %}{{ nothing }}{% endif %}")
    world.composer.templates.reload([])
    people = [person() for _ in range(11)] + [person(display_name="Odd")] + [person() for _ in range(11)]
    await world.know(*people)
    ids = [one.user_id for one in people]
    shown = await world.ended(await world.send(*ids, channels=["in_app"]))
    assert (shown.counts.made, shown.counts.not_composed) == (22, 1)
    assert {one.body for one in await world.notifications(shown)} == {"Rain\n"}
    both = await world.ended(await world.send(*ids, channels=["email", "in_app"]))
    assert (both.counts.made, both.counts.not_composed) == (23, 0)
    [odd] = [one for one in await world.notifications(both) if one.user_id == str(people[11].user_id)]
    assert (list(odd.channels), odd.body) == (["email"], "")
    [failed] = [one for one in await world.deliveries() if one.state == notifications_pb2.Delivery.PARKED]
    assert (failed.notification_id, failed.end_reason) == (odd.id, "NOT_COMPOSED")


async def test_a_page_that_takes_long_is_stored_as_far_as_it_is(world: World) -> None:
    people = [person() for _ in range(20)]
    await world.know(*people)
    strangers, gone = [uuid.UUID(int=1), uuid.UUID(int=2**128 - 1)], [uuid.UUID(int=3), uuid.UUID(int=2**128 - 2)]
    await copy.bury(world.connection, dict.fromkeys(gone, Deletion(1, 1)))
    world.sender.drain()
    hasty = Sender(world.pool, world.composer, lambda: None, turn=1e-6, poll_interval=0.05)
    sent = await world.send(*(one.user_id for one in people), *strangers, *gone, channels=["in_app"])
    made = []
    while (order := await sends.take(world.connection, 600.0)) is not None:
        await hasty._expand(order)
        counts = (await world.get(sent)).counts
        made.append((counts.made, counts.unknown, counts.deleted))
    assert made == [(8, 1, 1), (16, 1, 1), (20, 2, 2)]
    assert len(await world.notifications(sent)) == 20


async def test_who_has_lost_a_turn_composes_few_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from notification_service import sent as module

    people = [person() for _ in range(40)]
    await world.know(*people)
    world.sender.drain()
    sent = await world.send(*(one.user_id for one in people), channels=["in_app"])
    late = await hands(world)()
    await world.connection.execute("UPDATE sends SET lease_until = now()")
    order = await hands(world)()
    composed, sizes = module.notifications, list[int]()

    def counted(order: Order, people: Sequence[Person], *others: Any) -> Any:
        sizes.append(len(people))
        return composed(order, people, *others)

    monkeypatch.setattr(module, "notifications", counted)
    await world.sender._expand(late)
    assert sizes == [8, 16, 16]
    await world.sender._expand(order)
    assert sizes[3:] == [8] * 5
    assert (await world.get(sent)).counts.made == len(await world.notifications(sent)) == 40


async def test_a_mail_of_a_send_has_a_link_to_unsubscribe_by_and_the_app_has_not(world: World) -> None:
    write(world.templates_dir / "news.txt", "{{ params.what }} {{ unsubscribe_url }}")
    world.composer.templates.reload([])

    def link(user_id: uuid.UUID, category: str, address: str) -> str:
        return f"https://t.example/u/{user_id}-{category}-{address}"

    ada = person("ada")
    await world.know(ada)
    world.sender.drain()
    sender = Sender(world.pool, replace(world.composer, unsubscribe=link), lambda: None, turn=5.0, poll_interval=0.05)
    sent = await world.send(ada.user_id, channels=["email", "in_app"])
    order = await sends.take(world.connection, 600.0)
    assert order is not None
    await sender._expand(order)
    [note] = await world.notifications(sent)
    assert note.body.split() == ["Rain"]
    rows = await (await world.connection.execute("SELECT content FROM contents")).fetchall()
    mail = json.loads(rows[0][0])
    assert mail["unsubscribe_url"] == link(ada.user_id, "news", "ada@example.com")
    assert mail["text"].split() == ["Rain", mail["unsubscribe_url"]]
