"""Spans of the way of an event through this service, in the trace of the call that made it.

`process user_events` of each sampled event is a child of its `send user_events`, whatever batch it came in, and lasts
until what became of it is stored: `store inbox`, a child of it for a single event, else of a trace of its own that
links to each. Deliveries are children of the processing, one span per attempt: the context is stored with the
notification, so that this holds across restarts. It goes on to the other side, whether or not this process exports
spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from notification_service.channels import Outcome
from notification_service.domain import Leased, Result
from servicekit import telemetry
from tidings.users.v1 import users_pb2

_MOST_LINKS = 128
_PROCESS: dict[str, str | int] = {
    "messaging.system": "tidings",
    "messaging.operation.name": "process",
    "messaging.operation.type": "process",
    "messaging.destination.name": "user_events",
}

_tracer = trace.get_tracer(__name__)

# The processing of each sampled event, by the event's id.
Spans = Mapping[str, Span]


@contextmanager
def processing(events: Sequence[users_pb2.UserEvent]) -> Iterator[Spans]:
    """The spans of the sampled events of a batch."""
    spans = _process_spans(events) if telemetry.enabled() else {}
    try:
        yield spans
    except BaseException as error:
        for span in spans.values():
            telemetry.failed(span, error)
        raise
    finally:
        for span in spans.values():
            span.end()


def _process_spans(events: Sequence[users_pb2.UserEvent]) -> dict[str, Span]:
    spans = {}
    for event in events:
        if not event.trace_parent:
            continue
        sender = telemetry.extract(event.trace_parent, event.trace_state)
        if not trace.get_current_span(sender).get_span_context().trace_flags.sampled:
            continue
        attributes = {**_PROCESS, "messaging.message.id": event.id, "tidings.position": event.position}
        spans[event.id] = _tracer.start_span(
            "process user_events", context=sender, kind=SpanKind.CONSUMER, attributes=attributes
        )
    return spans


@contextmanager
def storing(spans: Spans, events: int) -> Iterator[None]:
    """The span of the transaction that stores what became of so many events."""
    if not spans:
        yield
        return
    first, *_ = spans.values()
    links = [Link(span.get_span_context()) for span in islice(spans.values(), _MOST_LINKS)]
    with _tracer.start_as_current_span(
        "store inbox",
        context=trace.set_span_in_context(first, Context()) if events == 1 else telemetry.sampled(),
        links=[] if events == 1 else links,
        attributes={"db.system.name": "postgresql", "messaging.batch.message_count": events},
        record_exception=False,
    ):
        yield


class Attempt:
    """What goes on to the other side, and where the outcome is noted."""

    def __init__(self, trace_parent: str, trace_state: str, span: trace.Span) -> None:
        self.trace_parent = trace_parent
        self.trace_state = trace_state
        self._span = span

    def ended(self, outcome: Outcome) -> None:
        """Notes how the attempt ended: by its code, for what the other side says of it may name a user."""
        self._span.set_attribute("tidings.outcome", outcome.result.name)
        if outcome.code:
            self._span.set_attribute("tidings.response_code", outcome.code)
        if outcome.result is not Result.SUCCEEDED:
            self._span.set_attribute("error.type", str(outcome.code) if outcome.code else outcome.result.name)
            self._span.set_status(Status(StatusCode.ERROR))


@contextmanager
def attempt(leased: Leased) -> Iterator[Attempt]:
    """The span of one delivery attempt, if the change that it tells of is sampled."""
    parent = telemetry.extract(leased.trace_parent, leased.trace_state) if telemetry.enabled() else Context()
    if not trace.get_current_span(parent).get_span_context().trace_flags.sampled:
        yield Attempt(leased.trace_parent, leased.trace_state, trace.INVALID_SPAN)
        return
    with _tracer.start_as_current_span(
        f"deliver {leased.channel}",
        context=parent,
        kind=SpanKind.CLIENT,
        attributes={"tidings.delivery_id": str(leased.id), "tidings.attempt": leased.number},
    ) as span:
        yield Attempt(*telemetry.carried(span.get_span_context()), span)
