"""What a notification service says of itself, after a delivery, a refusal and one that is still tried."""

from __future__ import annotations

import grpc.aio

import servicekit.metrics
from notification_service import metrics
from tests.harness import Databases, ServiceProcess, Services, scrape, until
from tests.notifications.conftest import MailServer
from tidings.client import Notifications, connect
from tidings.users.v1 import users_pb2, users_pb2_grpc

DECLARED = {one.prometheus_name: one for one in (*servicekit.metrics.INSTRUMENTS, *metrics.INSTRUMENTS)}
EMAIL, WEBHOOK = {"tidings_channel": "email"}, {"tidings_channel": "webhook"}


async def test_the_numbers_are_those_of_what_was_done(
    databases: Databases, services: Services, mail: MailServer
) -> None:
    mail.answers = {"bob@example.com": ["550 5.1.1 no such user"], "eve@example.com": ["451 4.3.0 later"] * 100}
    users = await services.users(await databases.users()).start()
    database = await databases.notifications()
    settings = {"smtp_host": "127.0.0.1", "smtp_port": mail.port, "metrics_address": "127.0.0.1:0"}
    following = await services.notifications(database, users, **settings).start()
    async with grpc.aio.insecure_channel(users.address) as channel:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        for name in ("ada", "bob", "eve"):
            await stub.CreateUser(
                users_pb2.CreateUserRequest(user=users_pb2.User(username=name, email=f"{name}@example.com"))
            )
    await until(lambda: _has_ended(following, delivered=1, parked=1))
    await until(lambda: _has_tried(following))

    scraped = await scrape(following)
    assert scraped.value("messaging_client_consumed_messages_total", messaging_destination_name="user_events") == 3
    assert scraped.value("tidings_feed_commit_to_processed_seconds_count") == 3
    assert 1 <= scraped.value("messaging_process_duration_seconds_count") <= 3
    assert scraped.value("tidings_inbox_position") == 3
    assert scraped.value("tidings_inbox_lag_events") == scraped.value("tidings_inbox_lag_time_seconds") == 0
    attempts = "tidings_delivery_attempts_total"
    assert scraped.value(attempts, tidings_outcome="succeeded", **EMAIL) == 1
    assert scraped.value(attempts, tidings_outcome="refused", **EMAIL) == 1
    assert scraped.value(attempts, tidings_outcome="failed", **EMAIL) >= 1
    assert scraped.value(attempts, **WEBHOOK) == 0
    assert scraped.value("tidings_delivery_duration_seconds_count", **EMAIL) == scraped.value(attempts, **EMAIL)
    assert scraped.value("tidings_delivery_commit_to_delivered_seconds_count", **EMAIL) == 1
    assert scraped.value("tidings_delivery_commit_to_delivered_seconds_sum", **EMAIL) > 0
    assert scraped.value("tidings_templates_refused") == 0
    assert scraped.value("tidings_ready") == 1
    assert {one.value for one in scraped.all("tidings_background_alive")} == {1}
    for sample in scraped.samples:
        name = sample.name
        for suffix in ("_bucket", "_sum", "_count"):
            name = name if name in DECLARED else sample.name.removesuffix(suffix)
        assert set(sample.labels) - {"le"} == {key.replace(".", "_") for key in DECLARED[name].attributes}
    assert {one.labels["tidings_channel"] for one in scraped.samples if "tidings_channel" in one.labels} == {
        "email",
        "webhook",
    }

    # Another replica knows what the database knows, from its first look on, and nothing of the feed.
    standing_by = await services.notifications(database, users, **settings).start()

    async def looked() -> bool:
        return (await scrape(standing_by)).has("tidings_deliveries_parked")

    await until(looked)
    scraped = await scrape(standing_by)
    assert scraped.value("tidings_deliveries_parked", **EMAIL) == 1
    assert scraped.value("tidings_deliveries_pending", **EMAIL) == 1
    assert scraped.value("tidings_deliveries_oldest_pending_age_seconds", **EMAIL) > 0
    for state in ("parked", "pending", "oldest_pending_age_seconds"):
        assert scraped.value(f"tidings_deliveries_{state}", **WEBHOOK) == 0
    assert scraped.value("tidings_inbox_position") == 3
    assert not scraped.has("tidings_inbox_lag_events")
    assert (await standing_by.stop(), await following.stop()) == (0, 0)


async def _has_ended(process: ServiceProcess, delivered: int, parked: int) -> bool:
    async with connect(process.address) as channel:
        inbox = await Notifications(channel).inbox()
    return (inbox.delivered, inbox.parked) == (delivered, parked)


async def _has_tried(process: ServiceProcess) -> bool:
    return (await scrape(process)).value("tidings_delivery_attempts_total", tidings_outcome="failed") >= 1


async def test_a_feed_that_is_ahead_is_seen(databases: Databases, services: Services, mail: MailServer) -> None:
    users = await services.users(await databases.users()).start()
    made = await databases.notifications()
    process = await services.notifications(
        made, users, smtp_host="127.0.0.1", smtp_port=mail.port, metrics_address="127.0.0.1:0"
    ).start()
    await process.wait_log("following the user feed")
    # The feed's first bookmark is stored: from here on it waits for what comes.
    await until(lambda: _lags(process, 0))
    # Somebody else holds the cursor: what is received cannot be stored.
    async with await made.connect() as other, other.transaction():
        await other.execute("SELECT * FROM inbox FOR UPDATE")
        async with grpc.aio.insecure_channel(users.address) as channel:
            stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
            ada = users_pb2.User(username="ada", email="ada@example.com")
            await stub.CreateUser(users_pb2.CreateUserRequest(user=ada))
        await until(lambda: _lags(process, 1))
        first = (await scrape(process)).value("tidings_inbox_lag_time_seconds")
        assert (await scrape(process)).value("tidings_inbox_lag_time_seconds") > first > 0
    await until(lambda: _lags(process, 0))
    assert (await scrape(process)).value("tidings_inbox_lag_time_seconds") == 0


async def _lags(process: ServiceProcess, events: int) -> bool:
    scraped = await scrape(process)
    return scraped.has("tidings_inbox_lag_events") and scraped.value("tidings_inbox_lag_events") == events


async def test_a_copy_of_the_users_that_is_behind_is_seen(
    databases: Databases, services: Services, mail: MailServer
) -> None:
    users = await services.users(await databases.users()).start()
    made = await databases.notifications()
    process = await services.notifications(
        made, users, smtp_host="127.0.0.1", smtp_port=mail.port, metrics_address="127.0.0.1:0"
    ).start()
    lag, late = "tidings_recipients_lag_events", "tidings_recipients_lag_time_seconds"

    async def lags(events: int) -> bool:
        scraped = await scrape(process)
        return scraped.has(lag) and scraped.value(lag) == events

    await process.wait_log("the copy of the users is whole")
    await until(lambda: lags(0))
    assert (await scrape(process)).value(late) == 0
    # Who stores for the copy waits for its row: what is received is not in it.
    async with await made.connect() as other, other.transaction():
        await other.execute("SELECT * FROM recipients_feed FOR UPDATE")
        async with grpc.aio.insecure_channel(users.address) as channel:
            stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
            ada = users_pb2.User(username="ada", email="ada@example.com")
            await stub.CreateUser(users_pb2.CreateUserRequest(user=ada))
        await until(lambda: lags(1))
        first = (await scrape(process)).value(late)
        assert (await scrape(process)).value(late) > first > 0
    await until(lambda: lags(0))
    assert (await scrape(process)).value(late) == 0
