"""The inbox and the subscriber against a real Postgres: one effect per event, whoever processes it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from notification_service import domain, lanes, rules
from notification_service.channels.email import Mail
from notification_service.compose import Composer
from notification_service.domain import Cursor
from notification_service.endpoints import Endpoint
from notification_service.follower import Source
from notification_service.inbox import Inbox
from notification_service.store import feed as rows
from notification_service.store import reads, standing
from notification_service.store import shards as leases
from notification_service.subscriber import Subscriber
from notification_service.templates import Templates
from servicekit import database
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, TRACE_PARENT, Events, batch, eventually, write
from tidings.client import ApiError, Batch, CursorStore, FeedError, PositionExpiredError
from tidings.client.feed import Start
from tidings.notifications.v1 import notifications_pb2

LOG_ID = uuid.uuid4()


def inbox_of(composer: Composer) -> Inbox:
    return Inbox(composer, lambda: None)


async def begin(connection: Connection) -> Cursor:
    return replace(await rows.read_cursor(connection), log_id=LOG_ID)


async def counts(connection: Connection) -> tuple[int, int]:
    row = await (
        await connection.execute("SELECT (SELECT count(*) FROM notifications), (SELECT count(*) FROM deliveries)")
    ).fetchone()
    assert row is not None
    return row[0], row[1]


async def test_a_large_batch_keeps_its_order(connection: Connection, composer: Composer, events: Events) -> None:
    made = [events.created(f"user-{number}", display_name=f"User {number}") for number in range(150)]
    await inbox_of(composer).store(connection, await begin(connection), batch(*made))
    found = await connection.execute("SELECT event_position, subject FROM notifications ORDER BY position")
    assert await found.fetchall() == [(number + 1, f"Welcome, User {number}") for number in range(150)]


async def test_a_batch_and_its_cursor_are_stored_together(
    connection: Connection, composer: Composer, events: Events
) -> None:
    user = events.user("ada", display_name="Ada")
    made = [events.created("bob"), events.updated(user, email="ada@new.example"), events.updated(user, locale="de")]
    made.append(events.deleted(user))
    hints = []
    inbox = Inbox(composer, lambda: hints.append(1))
    after = await inbox.store(connection, await begin(connection), batch(*made))
    assert after == Cursor(LOG_ID, "token-4", 4, 3, 4)
    assert await rows.read_cursor(connection) == after
    assert hints == [1]

    found = await reads.list_notifications(connection, {}, 1 << 62, 10)
    assert [(one.position, one.rule, one.event_position) for one in found] == [
        (3, "goodbye", 4),
        (2, "email-changed", 2),
        (1, "welcome", 1),
    ]
    assert [one.subject for one in found] == [
        "",
        "The email address of your account ada was changed",
        "Welcome, bob",
    ]
    assert list(found[2].channels) == ["email", "in_app", "webhook"]
    assert found[2].id == str(domain.notification_id(uuid.UUID(made[0].id), "welcome"))
    assert all(one.trace_parent == TRACE_PARENT and one.trace_state == "vendor=1" for one in found)

    listed = await reads.list_deliveries(connection, {}, 1 << 62, 10)
    assert [one.delivery.target for one in listed] == [
        "ada@example.com",
        "ada@new.example",
        "ada@example.com",
        "bob@example.com",
    ]
    first = listed[-1].delivery
    assert first.idempotency_key == f"<{first.id}@tidings.localhost>"
    assert first.state == notifications_pb2.Delivery.PENDING
    assert first.trace_parent == TRACE_PARENT

    said = {
        str(row[0]): Mail.decode(row[1]).text
        for row in await (await connection.execute("SELECT delivery_id, content FROM contents")).fetchall()
    }
    assert "no longer reach you" not in said[listed[1].delivery.id]
    assert "no longer reach you" in said[listed[2].delivery.id]

    state = await standing.inbox_state(connection)
    # ada's notices of before are not sent any more, now that she is deleted.
    assert (state.log_id, state.position, state.notifications) == (str(LOG_ID), 4, 3)
    assert (state.pending, state.cancelled) == (2, 2)
    assert state.position_time.ToDatetime() == made[-1].commit_time.ToDatetime().replace(
        microsecond=state.position_time.ToDatetime().microsecond
    )


async def test_two_replicas_that_process_the_same_events_store_them_once(
    url: str, composer: Composer, events: Events
) -> None:
    made = [events.created(f"user{number}") for number in range(20)]
    async with await database.connect(url, "a") as one, await database.connect(url, "b") as other:
        cursor = await begin(one)
        results = await asyncio.gather(
            inbox_of(composer).store(one, cursor, batch(*made)),
            inbox_of(composer).store(other, cursor, batch(*made)),
            return_exceptions=True,
        )
        assert sorted(type(result).__name__ for result in results) == ["Cursor", "CursorMovedError"]
        assert await counts(one) == (20, 20)
        # The loser's connection is good for the next batch.
        cursor = await rows.read_cursor(other)
        assert cursor.position == 20
        await inbox_of(composer).store(other, cursor, batch(events.created("next")))
        assert (await rows.read_cursor(one)).notification_position == 21


async def test_events_that_come_again_under_other_positions_have_no_second_effect(
    connection: Connection, composer: Composer, events: Events
) -> None:
    made = [events.created("ada"), events.created("bob")]
    cursor = await inbox_of(composer).store(connection, await begin(connection), batch(*made))
    again = [made[0], made[1], events.created("eve")]
    for position, event in enumerate(again, 3):
        event.position = position
    cursor = await inbox_of(composer).store(connection, cursor, batch(*again))
    assert (cursor.position, cursor.notification_position, cursor.delivery_position) == (5, 3, 3)
    found = await reads.list_notifications(connection, {}, 1 << 62, 10)
    assert [one.position for one in found] == [3, 2, 1]


async def test_a_bookmark_moves_the_cursor_only(connection: Connection, composer: Composer) -> None:
    cursor = await inbox_of(composer).store(connection, await begin(connection), batch(after=7, token="later"))
    assert (cursor.position, cursor.resume_token) == (7, "later")
    assert await rows.read_cursor(connection) == cursor
    assert await rows.silence(connection) < 5


async def test_a_template_that_cannot_be_rendered_parks_its_delivery_and_nothing_else(
    connection: Connection, events: Events, tmp_path: Path
) -> None:
    write(tmp_path / "t.subject.txt", "Hi")
    write(tmp_path / "t.txt", "{{ user.labels.tier }}")
    write(tmp_path / "t.html", "{{ user.labels.tier }}")
    text = '[[rules]]\nname="r"\non=["CREATED"]\ntemplate="t"\ncategory="c"\nchannels=["email","in_app"]\n'
    composer = Composer(rules.load(write(tmp_path / "r.toml", text)), Templates(tmp_path), lanes.writers(SENDER, ()))
    composer.check()
    made = [events.created("bad"), events.created("good", labels={"tier": "gold"})]
    cursor = await inbox_of(composer).store(connection, await begin(connection), batch(*made))
    assert cursor.notification_position == 2
    good, bad = await reads.list_notifications(connection, {}, 1 << 62, 10)
    assert (list(good.channels), good.body) == (["email", "in_app"], "gold\n")
    assert (list(bad.channels), bad.body) == (["email"], "")
    pending, parked = (one.delivery for one in await reads.list_deliveries(connection, {}, 1 << 62, 10))
    assert pending.state == notifications_pb2.Delivery.PENDING
    assert parked.state == notifications_pb2.Delivery.PARKED
    assert parked.HasField("end_time")
    (attempt,) = parked.attempts
    assert attempt.outcome == notifications_pb2.Delivery.Attempt.REFUSED
    assert "has no attribute 'tier'" in attempt.detail
    state = await standing.inbox_state(connection)
    assert (state.pending, state.parked, state.delivered) == (1, 1, 0)


def test_a_webhook_says_the_change(events: Events) -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    wanting = Endpoint.model_validate({"name": "a", "url": "http://a/", "secret": secret, "events": ["UPDATED"]})
    other = Endpoint.model_validate({"name": "b", "url": "http://b/", "secret": secret, "categories": ["account"]})
    composer = Composer(
        rules.load(None), Templates(), lanes.writers(SENDER, (wanting.destination(), other.destination()))
    )
    event = events.updated(events.user("ada", labels={"b": "1", "a": "2"}), email="ada@new.example")
    (notification,) = composer.compose([event])
    assert composer.compose([event]) == [notification]
    calls = [one for one in notification.deliveries if one.channel == "webhook"]
    assert [(one.target, one.idempotency_key) for one in calls] == [("http://a/", str(calls[0].id))]
    said = json.loads(calls[0].content)
    assert said["type"] == "user.updated"
    assert said["timestamp"] == event.commit_time.ToJsonString()
    assert said["data"]["notification"] == {
        "id": str(notification.id),
        "rule": "email-changed",
        "category": "security",
    }
    assert said["data"]["event"]["changed_fields"] == ["email"]
    assert said["data"]["user"]["email"] == "ada@new.example"
    assert said["data"]["previous"]["email"] == "ada@example.com"


def test_one_address_is_told_once(events: Events, composer: Composer) -> None:
    before = events.user("ada", email="Ada@example.com")
    (notification,) = composer.compose([events.updated(before, email="ada@example.com")])
    assert [one.target for one in notification.deliveries] == ["Ada@example.com"]


class Feed:
    """Stands for the user feed: the events of a list, from where the cursor's token says."""

    def __init__(self, made: list[Any], size: int = 5) -> None:
        self.made = made
        self.size = size
        self.readers = 0
        self.grown = asyncio.Event()
        self.error: FeedError | None = None

    def open(self, cursor: CursorStore, shard: tuple[int, int], start: Start) -> AsyncGenerator[Batch, None]:
        assert shard == (0, 1)
        return self._read(cursor)

    async def _read(self, cursor: CursorStore) -> AsyncGenerator[Batch, None]:
        self.readers += 1
        try:
            token = await cursor.load()
            position = int(token.removeprefix("token-")) if token else 0
            while True:
                if self.error is not None:
                    raise self.error
                chunk = self.made[position : position + self.size]
                if not chunk:
                    self.grown.clear()
                    await self.grown.wait()
                    continue
                yield batch(*chunk)
                position += len(chunk)
                await asyncio.sleep(0)
        finally:
            self.readers -= 1

    def add(self, *made: Any) -> None:
        self.made.extend(made)
        self.grown.set()


async def _log_id() -> uuid.UUID:
    return LOG_ID


def subscriber_of(url: str, pool: Pool, composer: Composer, feed: Feed, patience: float = 60.0) -> Subscriber:
    source = Source(feed.open, _log_id)
    return Subscriber(url, pool, inbox_of(composer), source, shards=1, lease=1.0, patience=patience)


async def test_one_replica_subscribes_and_the_other_takes_over(
    url: str, pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    feed = Feed([events.created(f"user{number}") for number in range(12)])
    first, second = subscriber_of(url, pool, composer, feed), subscriber_of(url, pool, composer, feed)
    tasks = [asyncio.create_task(first.run())]

    async def stored(wanted: int) -> bool:
        return (await rows.read_cursor(connection)).position == wanted

    async def lives(wanted: int) -> bool:
        return len((await leases.look(connection)).replicas) == wanted

    try:
        await eventually(lambda: stored(12))
        assert (await rows.read_cursor(connection)).log_id == LOG_ID
        tasks.append(asyncio.create_task(second.run()))
        await eventually(lambda: lives(2))
        # The connection by which leases are renewed is good for no more than that.
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'tidings-notifications-shards'"
        )
        feed.add(*(events.created(f"more{number}") for number in range(5)))
        await eventually(lambda: stored(17))
        assert feed.readers == 1
        # One that ends without a word ...
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        feed.add(events.created("next"))
        await eventually(lambda: stored(18))
        [[epoch]] = await (await connection.execute("SELECT epoch FROM shards")).fetchall()
        # ... and one that leaves.
        await second.drain(1.0)
        assert feed.readers == 0
        assert not tasks[1].done()
        tasks.append(asyncio.create_task(subscriber_of(url, pool, composer, feed).run()))
        feed.add(events.created("last"))
        await eventually(lambda: stored(19))
        assert await (await connection.execute("SELECT shard, of, epoch FROM shards")).fetchall() == [(0, 1, epoch + 1)]
        assert await counts(connection) == (19, 19)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("hung", [False, True])
async def test_a_replica_of_an_earlier_release_keeps_the_feed_while_it_stores(
    url: str, pool: Pool, connection: Connection, composer: Composer, events: Events, hung: bool
) -> None:
    feed = Feed([events.created("ada")])
    await rows.read_cursor(connection)
    task = None
    try:
        async with await database.connect(url, "earlier") as earlier:
            assert await _holds_the_whole_feed(earlier)
            task = asyncio.create_task(subscriber_of(url, pool, composer, feed, patience=30.0).run())
            if hung:
                await connection.execute("UPDATE inbox SET update_time = now() - interval '1 hour'")
            else:
                await asyncio.sleep(0.5)
                assert await counts(connection) == (0, 0)
                await earlier.close()
            await eventually(lambda: _has(connection, 1))
        async with await database.connect(url, "earlier") as earlier:
            assert hung == await _holds_the_whole_feed(earlier)
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _holds_the_whole_feed(connection: Connection) -> bool:
    """As a release that knows no shards makes sure of it."""
    row = await (await connection.execute("SELECT pg_try_advisory_lock(%s)", (0x7469_6469_6E67_7301,))).fetchone()
    return row == (True,)


async def test_replicas_that_are_refused_go_on_once_the_cursor_is_moved(
    url: str, pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    feed = Feed([events.created(f"user{number}") for number in range(5)])
    feed.error = PositionExpiredError(ApiError(grpc.StatusCode.OUT_OF_RANGE, "gone", reason="POSITION_EXPIRED"))
    await rows.read_cursor(connection)
    subscribers = [subscriber_of(url, pool, composer, feed) for _ in range(2)]
    tasks = [asyncio.create_task(one.run()) for one in subscribers]

    def refused() -> list[str]:
        return [one.refused for one in subscribers if one.refused]

    try:
        await eventually(refused)
        # The other stands by, until it has to do without the first.
        assert refused() == ["the user feed cannot be followed: POSITION_EXPIRED"]
        first = 0 if subscribers[0].refused else 1
        tasks[first].cancel()
        await eventually(lambda: subscribers[1 - first].refused)
        feed.error = None
        await connection.execute("UPDATE inbox SET resume_token = 'token-3', position = 3, log_id = %s", (LOG_ID,))
        await eventually(lambda: _has(connection, 2))
        await eventually(lambda: not refused())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _has(connection: Connection, notifications: int) -> bool:
    return (await counts(connection))[0] == notifications


async def test_a_transaction_of_a_paused_process_is_ended_by_the_server(url: str, events: Events) -> None:
    session = {"idle_in_transaction_session_timeout": "100ms"}
    async with await database.connect(url, "paused", **session) as paused:
        await rows.read_cursor(paused)
        await rows.lock_cursor(paused, [])
        await asyncio.sleep(0.3)
        async with await database.connect(url, "other") as other:
            await asyncio.wait_for(rows.lock_cursor(other, []), 2.0)
            await other.execute("ROLLBACK")
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            await paused.execute("COMMIT")
