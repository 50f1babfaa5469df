"""From a batch and what is known of it to what its transaction writes and what its callers are answered.

Nothing here waits: the feed is locked meanwhile. A unit's refusal is its own; so is an item's, if its unit is
independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from opentelemetry.trace import Span
from uuid_utils import uuid7

from servicekit import telemetry
from servicekit.errors import ServiceError
from user_service import domain, events, store, tracing
from user_service.domain import Change, Decision, Known, Unit
from user_service.events import Entry
from user_service.lanes import Outcome, Waiting


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch writes, and what its callers are answered once it is committed."""

    changes: list[Change]
    entries: list[Entry]
    kept: list[store.Answer]
    outcomes: list[tuple[Waiting, list[Outcome]]]
    sends: list[tracing.Sent]


def lookups(batch: list[Waiting]) -> store.Lookups:
    """What must be read before the batch can be decided."""
    wanted = store.Lookups([], [], [], [])
    for waiting in batch:
        for item in waiting.unit.items:
            mutation = item.mutation
            if item.request_id is not None:
                wanted.request_ids.append(item.request_id)
            if isinstance(mutation, domain.Create):
                wanted.usernames.append(mutation.user.username)
                wanted.email_keys.append(mutation.email_key)
            else:
                wanted.ids.append(mutation.id)
                if isinstance(mutation, domain.Update):
                    if "username" in mutation.fields:
                        wanted.usernames.append(mutation.user.username)
                    if "email" in mutation.fields:
                        wanted.email_keys.append(mutation.email_key)
    return wanted


def plan(batch: list[Waiting], locked: store.Locked, known: Known, deleted_kept: timedelta) -> Plan:
    """Decides a batch and encodes its events. Answers at once who is refused."""
    moment = domain.moment(locked.time, deleted_kept)
    made = Plan([], [], [], [], [])
    position = locked.head
    for waiting in batch:
        unit = waiting.unit
        try:
            decide = domain.decide_each if unit.independent else domain.decide
            decided = decide(unit, known, moment)
        except ServiceError as error:
            waiting.refuse(error)
            continue
        outcomes = [one if isinstance(one, ServiceError) else _encoded(one) for one in decided]
        made.outcomes.append((waiting, outcomes))
        if unit.validate_only:
            continue
        span = None
        if waiting.wait is not None and any(one.change is not None for one in decided if isinstance(one, Decision)):
            span = tracing.sending(waiting.wait)
        origin = _origin(unit, span)
        group, lone = len(made.entries), unit.independent or len(decided) == 1
        for decision, answer in zip(decided, outcomes, strict=True):
            if isinstance(decision, ServiceError) or isinstance(answer, ServiceError):
                continue
            change, item = decision.change, decision.item
            if change is not None:
                position += 1
                event_id = uuid7()
                said = origin
                if unit.independent and (alone := tracing.sending_alone(unit.trace_parent)) is not None:
                    said = _origin(unit, alone)
                    made.sends.append(tracing.Sent(alone, position, 1))
                element = events.encode(change, position, str(event_id), moment.encoded, said)
                previous = None if change.previous is None else change.previous.SerializeToString()
                made.changes.append(change)
                fields = domain.field_bits(change.changed_fields)
                made.entries.append(
                    Entry(
                        position, event_id.bytes, lone, moment.time, element, previous,
                        change.id, change.type, fields,
                    )
                )  # fmt: skip
            if item.request_id is not None and decision.answer is None:
                key = (item.request_id, unit.caller, unit.method)
                made.kept.append(store.Answer(key, item.body_hash, answer))
        if not lone and len(made.entries) > group:
            made.entries[-1] = made.entries[-1]._replace(group_end=True)
        if span is not None:
            made.sends.append(tracing.Sent(span, position, len(made.entries) - group))
    return made


def _origin(unit: Unit, span: Span | None) -> bytes:
    if span is None:
        return events.origin(unit.actor, unit.trace_parent, unit.trace_state)
    return events.origin(unit.actor, *telemetry.carried(span.get_span_context()))


def _encoded(decision: Decision) -> bytes:
    if decision.change is not None:
        return decision.change.encoded
    if decision.answer is not None:
        return decision.answer
    assert decision.user is not None  # noqa: S101 - a decision has one of the three
    return decision.user.SerializeToString()
