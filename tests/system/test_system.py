"""From a call to a received mail: the way of a change through both services, and what is left of it after kill -9."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections import Counter

import grpc.aio

from tests.harness import ServiceProcess, until
from tests.system.conftest import System
from tests.users.calls import create, replay, stub_of
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

_TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
_TRACE = f"00-{_TRACE_ID}-00f067aa0ba902b7-01"


async def _delivered(system: System, count: int) -> None:
    async def done() -> bool:
        inbox = await system.api.inbox()
        return inbox.delivered >= count and not inbox.pending

    await until(done, 40, f"{count} deliveries have ended")


async def test_a_new_user_is_welcomed_by_mail_webhook_and_in_app(system: System) -> None:
    asked = create(display_name="Zoë Ångström", email="zoe@example.com", locale="sv-SE")
    made = await system.stub.CreateUser(asked, metadata=[("traceparent", _TRACE)])
    [mail] = await system.mail.wait(1)
    assert mail.recipients == ("zoe@example.com",)
    assert "Zoë Ångström" in mail.message["To"]
    text, html = mail.message.get_body(("plain",)), mail.message.get_body(("html",))
    assert text is not None
    assert html is not None
    assert "Zoë Ångström" in text.get_content()
    assert "Zoë Ångström" in html.get_content()
    assert _TRACE_ID in mail.message["Traceparent"]

    await until(lambda: system.webhooks.calls)
    [(headers, body)] = system.webhooks.calls
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(system.webhooks.secret.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"
    assert _TRACE_ID in headers["traceparent"]
    assert json.loads(body)["data"]["user"]["id"] == made.id

    await _delivered(system, 2)
    [notification] = [one async for one in system.api.list(user_id=made.id)]
    [event] = await replay(system.stub)
    assert (notification.rule, notification.event_id, notification.event_position) == ("welcome", event.id, 1)
    assert "Zoë Ångström" in notification.subject + notification.body
    deliveries = [one async for one in system.api.deliveries(notification_id=notification.id)]
    assert {one.channel for one in deliveries} == {"email", "webhook"}
    for one in deliveries:
        assert one.state == notifications_pb2.Delivery.DELIVERED
        assert [attempt.outcome for attempt in one.attempts] == [notifications_pb2.Delivery.Attempt.SUCCEEDED]
    keys = {one.channel: one.idempotency_key for one in deliveries}
    assert keys == {"email": mail.message_id, "webhook": headers["webhook-id"]}


async def test_both_addresses_hear_of_a_changed_email_and_a_deletion_is_confirmed(system: System) -> None:
    made = await system.stub.CreateUser(create(email="before@example.com"))
    await system.stub.UpdateUser(
        users_pb2.UpdateUserRequest(
            user={"id": made.id, "email": "after@example.com"}, update_mask={"paths": ["email"]}
        )
    )
    await system.stub.UpdateUser(
        users_pb2.UpdateUserRequest(user={"id": made.id, "display_name": "X"}, update_mask={"paths": ["display_name"]})
    )
    # What was still pending would be cancelled.
    await _delivered(system, 5)
    await system.stub.DeleteUser(users_pb2.DeleteUserRequest(id=made.id))
    mails = await system.mail.wait(4)
    await _delivered(system, 7)
    assert Counter(mail.recipients for mail in mails) == {("before@example.com",): 2, ("after@example.com",): 2}
    rules = [one.rule async for one in system.api.list(user_id=made.id)]
    assert rules == ["goodbye", "email-changed", "welcome"]
    assert len(system.mail.messages()) == 4


async def test_kill_9_of_each_service_while_writes_run(system: System) -> None:
    acknowledged: dict[str, users_pb2.User] = {}
    stop = asyncio.Event()

    async def write() -> None:
        stub = stub_of(system.users)
        while not stop.is_set():
            request = create()
            while request.user.username not in acknowledged and not stop.is_set():
                try:
                    made = await stub.CreateUser(request, timeout=5, wait_for_ready=True)
                    acknowledged[made.username] = made
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.05)

    async def kill(service: ServiceProcess) -> None:
        await asyncio.sleep(1)
        await service.kill()
        await service.restart()

    writers = [asyncio.create_task(write()) for _ in range(8)]
    for service in (system.notifications, system.users, system.notifications, system.users):
        await kill(service)
    await asyncio.sleep(0.5)
    stop.set()
    await asyncio.gather(*writers)

    events = await replay(system.stub)
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    stored = {event.user.username: event.user for event in events}
    assert len(stored) == len(events)
    assert {name: stored.get(name) for name in acknowledged} == acknowledged
    assert len(acknowledged) > 50

    # One notification for each event, one delivery for each of its channels; a mail that came twice is the same mail.
    await _delivered(system, 2 * len(events))
    notifications = [one async for one in system.api.list()]
    assert sorted(one.event_id for one in notifications) == sorted(event.id for event in events)
    mails = system.mail.messages()
    by_id: dict[str, set[tuple[str, ...]]] = {}
    for mail in mails:
        by_id.setdefault(mail.message_id, set()).add(mail.recipients)
    assert sorted(by_id.values(), key=str) == sorted(({(event.user.email,)} for event in events), key=str)
    # At most what was on its way when the process was killed, twice.
    assert len(mails) - len(by_id) <= 2 * 32
    assert {headers["webhook-id"] for headers, _ in system.webhooks.calls} == {
        one.idempotency_key async for one in system.api.deliveries(channel="webhook")
    }


async def test_a_mail_server_that_is_away_delays_and_loses_nothing(system: System) -> None:
    await system.mail.process.kill()
    for _ in range(5):
        await system.stub.CreateUser(create())

    async def failed() -> bool:
        return any(one.attempts for one in [one async for one in system.api.deliveries(channel="email")])

    await until(failed)
    await system.mail.start()
    mails = await system.mail.wait(5)
    assert len({mail.message_id for mail in mails}) == 5
    await _delivered(system, 10)
