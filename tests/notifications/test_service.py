"""The service as a process, behind a real user service: from a call to a mail and a webhook, and through a kill."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from standardwebhooks import Webhook

from notification_service.settings import NotificationServiceSettings
from servicekit.settings import InvalidSettingsError, load
from tests.harness import Collector, Databases, MailCatcher, ServiceProcess, Services, until
from tests.notifications.conftest import TRACE_PARENT, write
from tidings.client import Notifications
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc
from tidings.users.v1 import users_pb2, users_pb2_grpc

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TRACE_ID = TRACE_PARENT.split("-")[1]


@pytest.fixture
async def hooks() -> AsyncIterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    got: list[tuple[dict[str, str], bytes]] = []

    async def handle(request: web.Request) -> web.Response:
        got.append((dict(request.headers), await request.read()))
        return web.Response(text="thanks")

    app = web.Application()
    app.router.add_post("/hook", handle)
    async with TestServer(app) as server:
        yield str(server.make_url("/hook")), got


async def deliveries(process: ServiceProcess) -> list[notifications_pb2.Delivery]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub: notifications_pb2_grpc.NotificationServiceAsyncStub = notifications_pb2_grpc.NotificationServiceStub(
            channel
        )
        return list((await stub.ListDeliveries(notifications_pb2.ListDeliveriesRequest(page_size=1000))).deliveries)


async def all_delivered(process: ServiceProcess, count: int) -> bool:
    found = await deliveries(process)
    return len(found) == count and all(one.state == notifications_pb2.Delivery.DELIVERED for one in found)


async def test_the_way_of_a_change(
    databases: Databases,
    services: Services,
    mail_catcher: MailCatcher,
    hooks: tuple[str, list[tuple[dict[str, str], bytes]]],
    collector: Collector,
    tmp_path: Path,
) -> None:
    hook_url, calls = hooks
    file = write(
        tmp_path / "webhooks.toml", f'[[endpoints]]\nname = "crm"\nurl = "{hook_url}"\nsecret_env = "CRM_SECRET"\n'
    )
    users = await services.users(await databases.users()).start()
    database = await databases.notifications()
    environment = {
        "TIDINGS_NOTIFICATIONS_DATABASE_URL": database.url,
        "TIDINGS_NOTIFICATIONS_USERS_ADDRESS": users.address,
        "TIDINGS_NOTIFICATIONS_SMTP_PORT": str(mail_catcher.port),
        "TIDINGS_NOTIFICATIONS_WEBHOOKS_FILE": str(file),
        "CRM_SECRET": SECRET,
        "TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
    }
    process = services.process(
        "notification_service", "serve", environment=environment, listen_variable="TIDINGS_NOTIFICATIONS_LISTEN"
    )
    await process.start()
    traced = (("traceparent", TRACE_PARENT),)
    async with grpc.aio.insecure_channel(users.address) as channel:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        ada = users_pb2.User(username="ada", email="ada@example.com", display_name="Ада Лавлейс")
        ada = await stub.CreateUser(users_pb2.CreateUserRequest(user=ada), metadata=traced)
        changed = users_pb2.UpdateUserRequest(user=users_pb2.User(id=ada.id, email="countess@example.com"))
        changed.update_mask.paths.append("email")
        await stub.UpdateUser(changed, metadata=traced)
        # What was still pending would be cancelled.
        await until(lambda: all_delivered(process, 5))
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=ada.id), metadata=traced)
    await until(lambda: all_delivered(process, 7))

    mails = mail_catcher.messages()
    told = sorted((one.recipients[0], str(one.message["Subject"])) for one in mails)
    assert told == [
        ("ada@example.com", "The email address of your account ada was changed"),
        ("ada@example.com", "Welcome, Ада Лавлейс"),
        ("countess@example.com", "Goodbye, Ада Лавлейс"),
        ("countess@example.com", "The email address of your account ada was changed"),
    ]
    listed = await deliveries(process)
    assert {one.message_id for one in mails} == {one.idempotency_key for one in listed if one.channel == "email"}
    assert {one.trace_parent.split("-")[1] for one in listed} == {TRACE_ID}
    assert {one.message["Traceparent"].split("-")[1] for one in mails} == {TRACE_ID}

    said = [Webhook(SECRET).verify(body, headers) for headers, body in calls]
    assert sorted(one["type"] for one in said) == ["user.created", "user.deleted", "user.updated"]
    assert {headers["traceparent"].split("-")[1] for headers, _ in calls} == {TRACE_ID}

    assert await process.stop() == 0
    spans = [span for span in collector.spans if span.trace == TRACE_ID]
    names = Counter(span.name for span in spans)
    assert (names["process user_events"], names["deliver email"], names["deliver webhook"]) == (3, 4, 3)
    processed = {span.id for span in spans if span.name == "process user_events"}
    assert {span.parent for span in spans if span.name.startswith("deliver")} == processed
    sent_on = {headers["traceparent"].split("-")[2] for headers, _ in calls}
    assert sent_on == {span.id for span in spans if span.name == "deliver webhook"}


async def test_a_kill_doubles_at_most_what_was_in_flight(
    databases: Databases, services: Services, mail_catcher: MailCatcher
) -> None:
    count, slots = 300, 4
    users = await services.users(await databases.users()).start()
    process = services.notifications(
        await databases.notifications(), users, mail_catcher, email_slots=slots, send_timeout=0.5, lease=1.0
    )
    await process.start()
    async with grpc.aio.insecure_channel(users.address) as channel:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        await stub.BatchCreateUsers(
            users_pb2.BatchCreateUsersRequest(
                requests=[
                    users_pb2.CreateUserRequest(
                        user=users_pb2.User(username=f"user{number}", email=f"user{number}@example.com"),
                        request_id=str(uuid.uuid4()),
                    )
                    for number in range(count)
                ]
            )
        )
    await until(lambda: len(mail_catcher.paths()) >= count // 4, poll=0.01)
    await process.kill()
    assert len(mail_catcher.paths()) < count
    await process.restart()
    await until(lambda: all_delivered(process, count))

    mails = Counter(one.message_id for one in mail_catcher.messages())
    assert len(mails) == count
    assert sum(mails.values()) - count <= slots
    unknown = [
        one.idempotency_key
        for one in await deliveries(process)
        if any(attempt.outcome == notifications_pb2.Delivery.Attempt.UNKNOWN for attempt in one.attempts)
    ]
    assert {message_id for message_id, copies in mails.items() if copies > 1} <= set(unknown)
    assert len(unknown) <= slots


async def test_what_was_parked_while_the_mail_server_was_away_is_replayed(
    databases: Databases, services: Services, mail_catcher: MailCatcher
) -> None:
    await mail_catcher.stop()
    users = await services.users(await databases.users()).start()
    # Nothing but the replay itself can wake the dispatcher in time.
    process = services.notifications(await databases.notifications(), users, mail_catcher, tries=1, poll_interval=60)
    await process.start()
    async with grpc.aio.insecure_channel(users.address) as channel:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        user = users_pb2.User(username="ada", email="ada@example.com")
        await stub.CreateUser(users_pb2.CreateUserRequest(user=user))

    async def parked() -> bool:
        return [one.state for one in await deliveries(process)] == [notifications_pb2.Delivery.PARKED]

    await until(parked)
    await mail_catcher.start()
    async with grpc.aio.insecure_channel(process.address) as channel:
        assert await Notifications(channel).replay_all(reason="it is back") == 1
    [mail] = await mail_catcher.wait(1)
    await until(lambda: all_delivered(process, 1))
    [delivery] = await deliveries(process)
    assert delivery.idempotency_key == mail.message_id
    outcomes = notifications_pb2.Delivery.Attempt
    assert [attempt.outcome for attempt in delivery.attempts] == [outcomes.FAILED, outcomes.SUCCEEDED]
    assert [done.reason for done in delivery.operations] == ["it is back"]
    assert [event["deliveries"] for event in process.events("parked deliveries changed by hand")] == [1]


async def test_two_replicas_deliver_once(databases: Databases, services: Services, mail_catcher: MailCatcher) -> None:
    users = await services.users(await databases.users()).start()
    database = await databases.notifications()
    replicas = [services.notifications(database, users, mail_catcher) for _ in range(2)]
    await asyncio.gather(*(one.start() for one in replicas))
    async with grpc.aio.insecure_channel(users.address) as channel:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        for number in range(40):
            user = users_pb2.User(username=f"user{number}", email=f"user{number}@example.com")
            await stub.CreateUser(users_pb2.CreateUserRequest(user=user))
            if number == 20:
                following = [one for one in replicas if one.events("following the user feed")]
                assert len(following) == 1
                # The one that stood by goes on.
                assert await following[0].stop() == 0
                replicas.remove(following[0])
    await until(lambda: all_delivered(replicas[0], 40))
    mails = Counter(one.message_id for one in mail_catcher.messages())
    assert len(mails) == sum(mails.values()) == 40


async def test_a_wrong_rule_ends_it_with_one_line(services: Services, tmp_path: Path) -> None:
    rules = '[[rules]]\nname="hello"\non=["CREATED"]\ntemplate="absent"\ncategory="c"\nchannels=["email"]\n'
    file = write(tmp_path / "rules.toml", rules)
    process = services.notifications("postgresql://127.0.0.1:1/none", "127.0.0.1:1", rules_file=file)
    await process.launch()
    assert await process.wait() == 2
    assert [line for line in process.lines if line.startswith("error: ")] == [
        "error: rule 'hello': template absent.subject.txt is missing"
    ]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("mail_from", "nobody"), ("lease", 5), ("standby_patience", 15), ("rules_file", "/nonexistent"), ("tries", 0)],
)
def test_a_wrong_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(InvalidSettingsError) as caught:
        load(NotificationServiceSettings, database_url="postgresql://", **{setting: value})
    assert str(caught.value).startswith(f"TIDINGS_NOTIFICATIONS_{setting.upper()}: ")
    assert len(str(caught.value).splitlines()) == 1
