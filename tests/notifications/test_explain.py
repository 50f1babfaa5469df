"""ExplainDelivery: why somebody got a notification, or did not."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from notification_service import categories, explain, rules
from notification_service.domain import stamp
from notification_service.event_search import Found
from notification_service.explain import Facts
from notification_service.store.outlook import Circumstances
from tests.harness import Databases, MailCatcher, Services, until
from tests.notifications.conftest import Events
from tests.notifications.test_api import refusal
from tidings.client import Notifications, Preferences, UserFeed, Users
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc, preferences_pb2
from tidings.notifications.v1.notifications_pb2 import Delivery, Notification
from tidings.users.v1 import users_pb2

Step = notifications_pb2.ExplainDeliveryResponse.Step

NOW = datetime(2026, 11, 25, 23, 30, tzinfo=UTC)
NIGHT = {"quiet_hours": {"start": "22:00", "end": "07:00"}}
FREE = Circumstances("", None, None, "", False)


def at(seconds: float) -> Timestamp:
    """So long before now."""
    made = stamp(NOW - timedelta(seconds=seconds))
    assert made is not None
    return made


def facts(event: users_pb2.UserEvent | None, **more: Any) -> Facts:
    given = Facts(
        found=Found(event),
        processed=10,
        rules=rules.load(None),
        categories=categories.load(None),
        notifications=(),
        deliveries=(),
        circumstances={},
        away=lambda channel, target: "",
        disabled=(),
        now=NOW,
    )
    return replace(given, **more)


def verdicts(told: Facts, kind: Step.Kind.ValueType) -> dict[str, str]:
    return {one.name: one.verdict for one in explain.steps(told) if one.kind == kind}


def test_an_event_without_notifications_has_a_reason_by_rule(events: Events) -> None:
    renamed = events.updated(events.user("ada"), display_name="Ada")
    told = facts(renamed)
    assert verdicts(told, Step.RULE) == {
        "welcome": "OTHER_TYPE",
        "email-changed": "OTHER_FIELDS",
        "goodbye": "OTHER_TYPE",
    }
    assert [one.verdict for one in explain.steps(told)][:2] == ["FOUND", "PROCESSED"]
    assert "changed display_name" in explain.steps(told)[0].detail


def test_an_event_that_is_not_processed_waits(events: Events) -> None:
    told = facts(events.created("ada"), processed=0)
    assert [one.verdict for one in explain.steps(told)][:2] == ["FOUND", "WAITING"]
    assert verdicts(told, Step.RULE)["welcome"] == "MATCHES_NOW"
    assert "will make" in next(one.detail for one in explain.steps(told) if one.name == "welcome")


def test_a_rule_that_came_later_is_told_from_one_that_matched(events: Events) -> None:
    created = events.created("ada")
    told = facts(created)
    assert "added or changed since" in next(one.detail for one in explain.steps(told) if one.name == "welcome")
    made = Notification(id=str(uuid.uuid4()), rule="of-before", category="account", channels=["in_app"])
    made.create_time.CopyFrom(at(60))
    by_rule = verdicts(facts(created, notifications=[made]), Step.RULE)
    assert (by_rule["of-before"], by_rule["goodbye"]) == ("MATCHED", "OTHER_TYPE")


@pytest.mark.parametrize(("found", "verdict"), [(Found(expired=True), "EXPIRED"), (Found(problem="no"), "UNKNOWN")])
def test_without_the_event_nothing_is_claimed_of_the_rules(found: Found, verdict: str) -> None:
    told = replace(facts(None), found=found)
    assert explain.steps(told)[0].verdict == verdict
    assert set(verdicts(told, Step.RULE).values()) == {"NOT_CHECKED"}


def pending(**more: Any) -> tuple[Notification, Delivery]:
    note = Notification(
        id=str(uuid.uuid4()),
        rule="welcome",
        category="account",
        template="welcome",
        template_version="v",
        channels=["email", "in_app", "webhook"],
    )
    note.create_time.CopyFrom(at(120))
    note.read_time.CopyFrom(at(20))
    note.seen_time.CopyFrom(at(30))
    delivery = Delivery(
        id=str(uuid.uuid4()),
        notification_id=note.id,
        user_id=str(uuid.uuid4()),
        channel="email",
        target="ada@example.com",
        state=Delivery.PENDING,
        **more,
    )
    delivery.next_attempt_time.CopyFrom(at(0))
    return note, delivery


def of(event: users_pb2.UserEvent, note: Notification, delivery: Delivery, now: Circumstances, **more: Any) -> Facts:
    return facts(
        event, notifications=[note], deliveries=[delivery], circumstances={uuid.UUID(delivery.id): now}, **more
    )


@pytest.mark.parametrize(
    ("given", "now", "verdict", "detail"),
    [
        ({}, {}, "DUE", "room"),
        ({}, {"document": NIGHT}, "QUIET_HOURS", "until 2026-11-26 07:00 UTC"),
        ({}, {"document": NIGHT, "time_zone": "America/New_York"}, "DUE", "room"),
        ({}, {"document": {"channels": {"email": False}}}, "SWITCHED_OFF", "off by the user's choice for the channel"),
        ({}, {"suppressed": "BOUNCED"}, "SUPPRESSED", "BOUNCED"),
        ({"waits_for": "other"}, {}, "WAITS_FOR_EARLIER", "earlier"),
    ],
)
def test_what_is_pending_has_an_outlook(
    events: Events, given: Mapping[str, Any], now: Mapping[str, Any], verdict: str, detail: str
) -> None:
    note, delivery = pending(**given)
    last = explain.steps(of(events.created("ada"), note, delivery, replace(FREE, **now)))[-1]
    assert (last.kind, last.verdict) == (Step.OUTLOOK, verdict)
    assert detail in last.detail
    assert (last.delivery_id, last.channel, last.target) == (delivery.id, "email", "ada@example.com")


def test_the_outlook_knows_who_is_away_or_disabled(events: Events) -> None:
    note, delivery = pending()
    away = of(events.created("ada"), note, delivery, FREE, away=lambda channel, target: f"{channel} {target}")
    assert (explain.steps(away)[-1].verdict, explain.steps(away)[-1].name) == ("PAUSED", "email ada@example.com")
    disabled = replace(away, disabled=frozenset({"ada@example.com"}))
    assert explain.steps(disabled)[-1].verdict == "DISABLED"
    delivery.next_attempt_time.CopyFrom(at(-60))
    retry = explain.steps(of(events.created("ada"), note, delivery, FREE))[-1]
    assert (retry.verdict, retry.time) == ("RETRY", at(-60))
    leased = explain.steps(of(events.created("ada"), note, delivery, replace(FREE, leased=True)))
    assert all(one.kind != Step.OUTLOOK for one in leased)


def test_what_happened_is_in_the_order_of_its_times(events: Events) -> None:
    note, delivery = pending()
    delivery.decisions.add(reason="QUIET_HOURS", detail="quiet hours until 07:00", time=at(110))
    first = delivery.attempts.add(number=1, outcome=2, code=451, detail="later", provider="smtp", start_time=at(100))
    first.end_time.CopyFrom(at(99.5))
    delivery.operations.add(kind=1, actor="ops", reason="mended", time=at(50))
    delivery.attempts.add(number=2, outcome=1, code=250, detail="ok", provider="other", start_time=at(40))
    delivery.state, delivery.end_reason = Delivery.DELIVERED, ""
    delivery.end_time.CopyFrom(at(39))
    changed = replace(FREE, document={"channels": {"email": True}}, document_time=NOW - timedelta(seconds=45))
    told = [one for one in explain.steps(of(events.created("ada"), note, delivery, changed)) if one.delivery_id]
    assert [(one.kind, one.verdict, one.name, one.code) for one in told] == [
        (Step.PREFERENCE, "ON", "CHANNEL", 0),
        (Step.DECISION, "QUIET_HOURS", "", 0),
        (Step.ATTEMPT, "FAILED", "smtp", 451),
        (Step.OPERATION, "REPLAYED", "ops", 0),
        (Step.ATTEMPT, "SUCCEEDED", "other", 250),
        (Step.END, "DELIVERED", "", 0),
    ]
    assert "decided anew" in told[0].detail
    assert told[2].detail == "attempt 1: later (500 ms)"


def test_channels_that_carry_nothing_say_so(events: Events) -> None:
    note, delivery = pending()
    told = [one for one in explain.steps(of(events.created("ada"), note, delivery, FREE)) if one.kind == Step.CHANNEL]
    assert [(one.channel, one.verdict) for one in told] == [
        ("in_app", "SHOWN"),
        ("in_app", "SEEN"),
        ("in_app", "READ"),
        ("webhook", "NO_TARGET"),
    ]
    note.channels.remove("in_app")
    told = [one for one in explain.steps(of(events.created("ada"), note, delivery, FREE)) if one.kind == Step.CHANNEL]
    assert [(one.channel, one.verdict) for one in told] == [("webhook", "NO_TARGET"), ("in_app", "NOT_COMPOSED")]


def test_a_mail_that_is_gathered_is_where_its_digest_is(events: Events) -> None:
    note, _ = pending()
    note.digest_id = str(uuid.uuid4())
    steps = explain.steps(facts(events.created("ada"), notifications=[note]))
    told = [one for one in steps if one.kind == Step.CHANNEL]
    assert ("email", "GATHERED", note.digest_id) in [(one.channel, one.verdict, one.name) for one in told]
    assert ("webhook", "NO_TARGET", "") in [(one.channel, one.verdict, one.name) for one in told]


async def test_a_mail_that_quiet_hours_held_and_an_event_that_made_nothing(
    databases: Databases, services: Services, mail_catcher: MailCatcher
) -> None:
    users_process = await services.users(await databases.users()).start()
    process = services.notifications(await databases.notifications(), users_process, mail_catcher, poll_interval=0.2)
    await process.start()
    async with (
        grpc.aio.insecure_channel(users_process.address) as users_channel,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        users, notifications, preferences = Users(users_channel), Notifications(channel), Preferences(channel)
        ada = await users.create(users_pb2.User(username="ada", email="ada@example.com"))
        await until(lambda: delivered(notifications, ada.id, 1))
        # Every minute of today and of tomorrow.
        days = sorted({(datetime.now(UTC) + timedelta(days=day)).isoweekday() for day in (-1, 0, 1)})
        quiet = preferences_pb2.Preferences.QuietHours(start="00:00", end="00:00", weekdays=days)
        decided = preferences_pb2.Preferences(user_id=ada.id, quiet_hours=quiet)
        await preferences.update(decided, ["quiet_hours"])
        await users.delete(ada.id)

        stub: notifications_pb2_grpc.NotificationServiceAsyncStub = notifications_pb2_grpc.NotificationServiceStub(
            channel
        )
        goodbye = await until(lambda: made_by("goodbye", notifications, ada.id))

        async def comes_to(verdict: str) -> bool:
            return (await notifications.explain(notification_id=goodbye[0].id))[-1].verdict == verdict

        await until(lambda: comes_to("QUIET_HOURS"))
        await preferences.update(preferences_pb2.Preferences(user_id=ada.id), ["quiet_hours"])
        await until(lambda: comes_to("DELIVERED"))
        steps = await notifications.explain(notification_id=goodbye[0].id, user_id=ada.id)
        told = [(Step.Kind.Name(one.kind), one.verdict) for one in steps]
        assert told == [
            ("EVENT", "FOUND"),
            ("INBOX", "PROCESSED"),
            ("RULE", "MATCHED"),
            ("NOTIFICATION", "MADE"),
            ("CHANNEL", "NO_TARGET"),
            ("PREFERENCE", "ON"),
            ("DECISION", "QUIET_HOURS"),
            ("ATTEMPT", "SUCCEEDED"),
            ("END", "DELIVERED"),
        ]

        bob = await users.create(users_pb2.User(username="bob", email="bob@example.com"))
        await users.update(users_pb2.User(id=bob.id, display_name="Bob"), ["display_name"])
        feed = await events_of(users_channel, 4)
        steps = await notifications.explain(event_id=feed[-1].id, user_id=bob.id)
        by_rule = {one.name: one.verdict for one in steps if one.kind == Step.RULE}
        assert by_rule == {"welcome": "OTHER_TYPE", "email-changed": "OTHER_FIELDS", "goodbye": "OTHER_TYPE"}
        # Of another user, or no event at all.
        for event_id in (feed[-1].id, str(uuid.uuid4())):
            steps = await notifications.explain(event_id=event_id, user_id=ada.id)
            assert [one.verdict for one in steps] == ["UNKNOWN", *["NOT_CHECKED"] * 3]

        refused = grpc.StatusCode.INVALID_ARGUMENT
        for request, said in (
            ({}, (refused, "INVALID_FIELD", ["subject"])),
            ({"event_id": feed[-1].id}, (refused, "INVALID_FIELD", ["user_id"])),
            ({"event_id": "x", "user_id": "y"}, (refused, "INVALID_FIELD", ["event_id", "user_id"])),
            (
                {"notification_id": goodbye[0].id, "user_id": bob.id},
                (grpc.StatusCode.NOT_FOUND, "UNKNOWN_NOTIFICATION", []),
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ExplainDelivery(notifications_pb2.ExplainDeliveryRequest(**request))
            assert refusal(caught.value) == said


async def delivered(notifications: Notifications, user_id: str, count: int) -> bool:
    found = [one async for one in notifications.deliveries(user_id=user_id)]
    return len(found) == count and all(one.state == Delivery.DELIVERED for one in found)


async def made_by(rule: str, notifications: Notifications, user_id: str) -> list[Notification]:
    return [one async for one in notifications.list(user_id=user_id) if one.rule == rule]


async def events_of(users: grpc.aio.Channel, count: int) -> list[users_pb2.UserEvent]:
    """The first events of the feed."""
    found: list[users_pb2.UserEvent] = []
    async with aclosing(aiter(UserFeed(users))) as batches:
        async for batch in batches:
            found += batch.events
            if len(found) >= count:
                break
    return found
