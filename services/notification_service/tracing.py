"""Spans of the way of an event: one where it is processed, one per delivery attempt, in the trace of the call that made
it.

The context of that call is stored with the notification and its deliveries, and goes on to the other side, whether or
not this process exports spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from notification_service.channels import Outcome
from notification_service.domain import Leased, Result
from servicekit import telemetry
from tidings.users.v1 import users_pb2

_PROPAGATOR = TraceContextTextMapPropagator()
_MOST_LINKS = 128


@contextmanager
def processing(events: Sequence[users_pb2.UserEvent]) -> Iterator[None]:
    """The span of a batch: a child of a single event's call, a trace of its own that links to the calls of several."""
    if not events or not telemetry.enabled():
        yield
        return
    contexts = [telemetry.extract(event.trace_parent, event.trace_state) for event in events[:_MOST_LINKS]]
    spans = [trace.get_current_span(context).get_span_context() for context in contexts]
    single = len(events) == 1 and spans[0].is_valid
    with trace.get_tracer(__name__).start_as_current_span(
        "process user_events",
        context=contexts[0] if single else None,
        kind=SpanKind.CONSUMER,
        links=[] if single else [Link(span) for span in spans if span.is_valid],
        attributes={
            "messaging.operation.type": "process",
            "messaging.destination.name": "user_events",
            "messaging.batch.message_count": len(events),
            "tidings.position": events[-1].position,
        },
    ):
        yield


class Attempt:
    """What goes on to the other side, and where the outcome is noted."""

    def __init__(self, trace_parent: str, trace_state: str, span: trace.Span) -> None:
        self.trace_parent = trace_parent
        self.trace_state = trace_state
        self._span = span

    def ended(self, outcome: Outcome) -> None:
        """Notes how the attempt ended."""
        self._span.set_attribute("tidings.outcome", outcome.result.name)
        if outcome.code:
            self._span.set_attribute("tidings.response_code", outcome.code)
        if outcome.result is not Result.SUCCEEDED:
            self._span.set_status(Status(StatusCode.ERROR, outcome.detail))


@contextmanager
def attempt(leased: Leased) -> Iterator[Attempt]:
    """The span of one delivery attempt."""
    if not telemetry.enabled():
        yield Attempt(leased.trace_parent, leased.trace_state, trace.INVALID_SPAN)
        return
    with trace.get_tracer(__name__).start_as_current_span(
        f"deliver {leased.channel}",
        context=telemetry.extract(leased.trace_parent, leased.trace_state),
        kind=SpanKind.CLIENT,
        attributes={"tidings.delivery_id": str(leased.id), "tidings.attempt": leased.number},
    ) as span:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        yield Attempt(carrier.get("traceparent", ""), carrier.get("tracestate", ""), span)
