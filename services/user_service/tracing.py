"""Spans of a change on its way through the writer.

One change is one trace: below the span of its call stand `wait for commit` and `send user_events`, whose context the
event carries on to whoever processes it. A group commit serves many traces and belongs to none: `commit batch` has a
trace of its own, links to each call that is sampled, and is linked from it. What nobody samples makes no spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind

from servicekit import telemetry

_MOST_LINKS = 128
_DATABASE = {"db.system.name": "postgresql"}
_SEND = {
    "messaging.system": "tidings",
    "messaging.operation.name": "send",
    "messaging.operation.type": "send",
    "messaging.destination.name": "user_events",
}

_tracer = trace.get_tracer(__name__)


@dataclass(frozen=True, slots=True)
class Wait:
    """A sampled call that waits for its commit."""

    call: Context
    span: Span


def waiting() -> Wait | None:
    """The `wait for commit` of the current call; None if nobody samples it. The caller ends its span."""
    if not trace.get_current_span().is_recording():
        return None
    return Wait(trace.set_span_in_context(trace.get_current_span(), Context()), _tracer.start_span("wait for commit"))


def sending(wait: Wait) -> Span:
    """`send user_events` of a sampled call. It is ended by `sent`, and never if its events do not come to be."""
    return _tracer.start_span("send user_events", context=wait.call, kind=SpanKind.PRODUCER, attributes=_SEND)


def sending_alone(trace_parent: str) -> Span | None:
    """`send user_events` of one event of an import, the root of a trace if it is sampled: each change has its own.
    Linked to the call, which may make millions, and is not asked whether these are sampled.
    """
    if not telemetry.enabled():
        return None
    draw = telemetry.draw()
    if draw is not None and not draw():
        return None
    caller = trace.get_current_span(telemetry.extract(trace_parent, "")).get_span_context()
    return _tracer.start_span(
        "send user_events",
        context=telemetry.sampled() if draw is not None else Context(),
        kind=SpanKind.PRODUCER,
        attributes=_SEND,
        links=[Link(caller)] if caller.is_valid else [],
    )


@dataclass(frozen=True, slots=True)
class Sent:
    """A `send user_events` under way, and what it sends."""

    span: Span
    position: int
    events: int


def sent(sends: Sequence[Sent]) -> None:
    """Ends the spans of what is committed and offered to subscribers."""
    for one in sends:
        one.span.set_attribute("messaging.batch.message_count", one.events)
        one.span.set_attribute("tidings.position", one.position)
        one.span.end()


class Commit:
    """A `commit batch` under way, or nothing."""

    def __init__(self, span: Span | None) -> None:
        self._span = span
        self._context = None if span is None else trace.set_span_in_context(span, Context())

    @contextmanager
    def flush(self, name: str) -> Iterator[None]:
        """A round trip to Postgres."""
        if self._span is None:
            yield
            return
        with _tracer.start_as_current_span(
            name, context=self._context, kind=SpanKind.CLIENT, attributes=_DATABASE, record_exception=False
        ):
            yield

    def ended(self, events: int, head: int) -> None:
        """Notes what was committed."""
        if self._span is not None:
            self._span.set_attribute("messaging.batch.message_count", events)
            self._span.set_attribute("tidings.position", head)


@contextmanager
def committing(units: int, waits: Sequence[Wait]) -> Iterator[Commit]:
    """The span of a batch with so many units, of which these are sampled."""
    if not waits:
        yield Commit(None)
        return
    links = [Link(wait.span.get_span_context()) for wait in waits[:_MOST_LINKS]]
    span = _tracer.start_span(
        "commit batch", context=telemetry.sampled(), links=links, attributes={"tidings.batch.units": units}
    )
    for wait in waits:
        wait.span.add_link(span.get_span_context())
    try:
        yield Commit(span)
    except BaseException as error:
        telemetry.failed(span, error)
        raise
    finally:
        span.end()
