"""Explains deliveries: from what is stored, and what applies now, the steps that decided what became of an event or a
send.

Pure. What was decided is told as it was noted then; what was not noted (why a rule made nothing, what a user wants) as
it is now, and the steps say so.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from notification_service import gate, preferences
from notification_service.categories import Categories
from notification_service.domain import EMAIL, IN_APP, stamp
from notification_service.event_search import Found
from notification_service.gate import Candidate, Defer, Send
from notification_service.rules import Rule
from notification_service.store.outlook import Circumstances
from tidings.notifications.v1 import notifications_pb2
from tidings.notifications.v1.notifications_pb2 import Delivery, Notification
from tidings.notifications.v1.sends_pb2 import Send as Send_
from tidings.users.v1 import users_pb2

Step = notifications_pb2.ExplainDeliveryResponse.Step

_Outcome = Delivery.Attempt.Outcome


@dataclass(frozen=True, slots=True)
class Sending:
    """A send, and whether it made a notification for the user or else why not: the verdict of a step and its detail."""

    send: Send_
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of an event, or of a send, and what was made of it; `notifications` and `deliveries` come by
    their positions.
    """

    found: Found
    # Up to which position the events of this user are processed.
    processed: int
    rules: Sequence[Rule]
    categories: Categories
    notifications: Sequence[Notification]
    deliveries: Sequence[Delivery]
    # By delivery.
    circumstances: Mapping[uuid.UUID, Circumstances]
    # Who would be asked, by channel and target, if all of them are away; else empty.
    away: Callable[[str, str], str]
    # Targets that exist and are not to be called now.
    disabled: Collection[str]
    now: datetime
    # Whether it is the event that is explained, with every rule, or one of its notifications.
    whole: bool = True
    # Of what a caller sent; then there is no event and no rule.
    sending: Sending | None = None


def steps(facts: Facts) -> list[Step]:
    """The steps, in order."""
    told = [_sent(facts.sending)] if facts.sending else [*_event(facts), *_rules(facts)]
    for one in facts.notifications:
        told += _notification(facts, one)
        for delivery in facts.deliveries:
            if delivery.notification_id == one.id:
                told += _delivery(facts, one, delivery)
    return told


def _sent(sending: Sending) -> Step:
    send = sending.send
    by = f" by {send.actor}" if send.actor else ""
    return Step(
        kind=Step.SEND,
        verdict=sending.verdict,
        time=send.start_time if send.HasField("start_time") else None,
        name=send.id,
        detail=f"template {send.template}, sent{by}: {sending.detail}",
    )


def _event(facts: Facts) -> Iterator[Step]:
    event = facts.found.event
    if event is None:
        expired = facts.found.expired
        detail = "the user feed does not retain it any more" if expired else facts.found.problem
        yield Step(kind=Step.EVENT, verdict="EXPIRED" if expired else "UNKNOWN", detail=detail)
        return
    kind = users_pb2.UserEvent.Type.Name(event.type)
    changed = f", changed {', '.join(event.changed_fields)}" if event.changed_fields else ""
    by = f", by {event.actor}" if event.actor else ""
    yield Step(
        kind=Step.EVENT,
        verdict="FOUND",
        time=event.commit_time,
        name=kind,
        detail=f"{kind} at position {event.position}{changed}{by}",
    )
    waits = event.position > facts.processed and not facts.notifications
    yield Step(
        kind=Step.INBOX,
        verdict="WAITING" if waits else "PROCESSED",
        detail=f"this user's events are processed up to position {facts.processed}",
    )


def _rules(facts: Facts) -> Iterator[Step]:
    made = {one.rule: one for one in facts.notifications}
    if facts.whole:
        for rule in facts.rules:
            yield _matched(made[rule.name]) if rule.name in made else _made_nothing(facts, rule)
    for one in facts.notifications:
        if not facts.whole or all(one.rule != rule.name for rule in facts.rules):
            yield _matched(one)


def _matched(one: Notification) -> Step:
    return Step(
        kind=Step.RULE,
        verdict="MATCHED",
        time=one.create_time,
        name=one.rule,
        notification_id=one.id,
        detail="it made a notification",
    )


def _made_nothing(facts: Facts, rule: Rule) -> Step:
    def step(verdict: str, detail: str) -> Step:
        return Step(kind=Step.RULE, verdict=verdict, name=rule.name, detail=detail)

    event = facts.found.event
    if event is None:
        return step("NOT_CHECKED", "it made nothing; why cannot be told without the event")
    if not rule.is_about(event):
        return step("OTHER_TYPE", f"it is about {', '.join(rule.on)}")
    if not rule.concerns(event):
        return step("OTHER_FIELDS", f"it is about changes of {', '.join(sorted(rule.changed_fields))}")
    if event.position > facts.processed:
        return step("MATCHES_NOW", "it will make a notification when the event is processed")
    return step("MATCHES_NOW", "it made nothing then: it was added or changed since")


def _notification(facts: Facts, one: Notification) -> Iterator[Step]:
    words = f", template {one.template}" if one.template_version else ""
    locale = f" in {one.locale}" if one.locale else ""
    yield Step(
        kind=Step.NOTIFICATION,
        verdict="MADE",
        time=one.create_time,
        name=one.category,
        notification_id=one.id,
        detail=f"category {one.category}{words}{locale}, over {', '.join(one.channels) or 'no channel'}",
    )
    rule = next((rule for rule in facts.rules if rule.name == one.rule), None)
    carried = {delivery.channel for delivery in facts.deliveries if delivery.notification_id == one.id}
    for channel in dict.fromkeys((*one.channels, *(rule.channels if rule else ()))):
        if channel == IN_APP:
            yield from _in_app(one)
        elif channel not in carried and channel == EMAIL and one.digest_id:
            gathered = _no_delivery(one, channel, "GATHERED", "its mail goes out with others, in a digest")
            gathered.name = one.digest_id
            yield gathered
        elif channel not in carried and channel in one.channels:
            yield _no_delivery(one, channel, "NO_TARGET", "there was nobody to send it to over this channel")


def _in_app(one: Notification) -> Iterator[Step]:
    if IN_APP not in one.channels:
        yield _no_delivery(one, IN_APP, "NOT_COMPOSED", "the rule is in-app, but its words could not be made then")
        return
    for verdict, time, detail in (
        ("SHOWN", one.create_time, "it is in the user's in-app inbox"),
        ("SEEN", one.seen_time, "the user saw it there"),
        ("READ", one.read_time, "the user read it there"),
        ("ARCHIVED", one.archive_time, "the user put it away"),
    ):
        if time.ByteSize():
            yield Step(
                kind=Step.CHANNEL,
                verdict=verdict,
                time=time,
                channel=IN_APP,
                notification_id=one.id,
                detail=detail,
            )


def _no_delivery(one: Notification, channel: str, verdict: str, detail: str) -> Step:
    return Step(kind=Step.CHANNEL, verdict=verdict, channel=channel, notification_id=one.id, detail=detail)


def _delivery(facts: Facts, one: Notification, delivery: Delivery) -> list[Step]:
    """What happened to a delivery by its time, between what its user wants and what is to come."""
    told = [*_preference(facts, one, delivery)]
    happened = [*_decisions(delivery), *_attempts(delivery), *_operations(delivery), *_end(delivery)]
    told += sorted(happened, key=lambda step: step.time.ToNanoseconds())
    if delivery.state == Delivery.PENDING:
        told += _outlook(facts, one, delivery)
    for step in told:
        step.notification_id, step.delivery_id = one.id, delivery.id
        step.channel, step.target = delivery.channel, delivery.target
    return told


def _preference(facts: Facts, one: Notification, delivery: Delivery) -> Iterator[Step]:
    now = facts.circumstances.get(uuid.UUID(delivery.id))
    if now is None:
        return
    applies = preferences.effective(now.document, one.category, facts.categories.of(one.category), delivery.channel)
    changed = now.document_time
    asked = [*delivery.decisions, *delivery.attempts]
    first = min((_moment(step) for step in asked), default=None)
    since = ""
    if first is not None and changed is not None and changed > first:
        since = f"; the user decided anew at {changed:%Y-%m-%d %H:%M:%S} UTC, after the delivery was first due"
    yield Step(
        kind=Step.PREFERENCE,
        verdict="ON" if applies.on else "OFF",
        time=stamp(changed),
        name=applies.source.name,
        detail=f"{one.category} on {delivery.channel} is {'on' if applies.on else 'off'} by {applies.why}{since}",
    )


def _moment(step: Any) -> datetime:
    time: Timestamp = step.start_time if isinstance(step, Delivery.Attempt) else step.time
    return time.ToDatetime(tzinfo=UTC)


def _decisions(delivery: Delivery) -> Iterator[Step]:
    for one in delivery.decisions:
        yield Step(kind=Step.DECISION, verdict=one.reason, time=one.time, detail=one.detail)


def _attempts(delivery: Delivery) -> Iterator[Step]:
    for one in delivery.attempts:
        open_yet = one.outcome == Delivery.Attempt.UNKNOWN and not one.HasField("end_time")
        under_way = open_yet and one is delivery.attempts[-1] and delivery.state == Delivery.PENDING
        took = ""
        if one.HasField("end_time"):
            took = f" ({one.end_time.ToMilliseconds() - one.start_time.ToMilliseconds()} ms)"
        yield Step(
            kind=Step.ATTEMPT,
            verdict="SENDING" if under_way else _Outcome.Name(one.outcome),
            time=one.start_time,
            name=one.provider,
            code=one.code,
            detail=f"attempt {one.number}: {one.detail or 'no answer is recorded'}{took}",
        )


def _operations(delivery: Delivery) -> Iterator[Step]:
    for one in delivery.operations:
        yield Step(
            kind=Step.OPERATION,
            verdict=Delivery.Operation.Kind.Name(one.kind),
            time=one.time,
            name=one.actor,
            detail=one.reason,
        )


def _end(delivery: Delivery) -> Iterator[Step]:
    if delivery.state == Delivery.PENDING:
        return
    tries = len(delivery.attempts)
    yield Step(
        kind=Step.END,
        verdict=Delivery.State.Name(delivery.state),
        time=delivery.end_time,
        name=delivery.end_reason,
        detail=f"after {tries} attempt{'' if tries == 1 else 's'}" if tries else "without an attempt",
    )


def _outlook(facts: Facts, one: Notification, delivery: Delivery) -> Iterator[Step]:
    def step(verdict: str, detail: str, **more: Any) -> Step:
        return Step(kind=Step.OUTLOOK, verdict=verdict, detail=detail, **more)

    now = facts.circumstances.get(uuid.UUID(delivery.id))
    if now is None or now.leased:
        return
    if delivery.waits_for:
        yield step("WAITS_FOR_EARLIER", "an earlier delivery of this user is not over", name=delivery.waits_for)
        return
    verdict = gate.decide(
        Candidate(
            uuid.UUID(delivery.user_id),
            one.category,
            delivery.channel,
            delivery.target,
            now.time_zone,
            now.document,
            now.suppressed,
        ),
        facts.categories,
        facts.now,
    )
    if isinstance(verdict, Defer):
        yield step(verdict.reason.name, verdict.detail, time=stamp(verdict.until))
    elif not isinstance(verdict, Send):
        yield step(verdict.reason.name, f"it will be cancelled: {verdict.detail}")
    elif delivery.target in facts.disabled:
        yield step("DISABLED", "its endpoint is disabled: it waits until that is enabled or deleted")
    elif away := facts.away(delivery.channel, delivery.target):
        yield step("PAUSED", "who would be asked does not answer: it waits until one probe succeeds", name=away)
    elif delivery.next_attempt_time.ToDatetime(tzinfo=UTC) > facts.now:
        yield step("RETRY", "it is tried again then", time=delivery.next_attempt_time)
    else:
        yield step("DUE", "it is sent as soon as there is room")
