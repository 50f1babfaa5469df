"""The newest spans, by trace, in memory: bounded in number and in bytes. The trace quiet for longest goes first.

A trace is shown as rows: a span, then its children by their beginning. A span whose parent is not here (the caller
keeps its own spans to itself, or they have not come yet) stands at the top.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Of one trace: an import is one call that makes any number of spans.
SPANS_PER_TRACE = 500


@dataclass(frozen=True, slots=True)
class Link:
    """Another span that a span has to do with."""

    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened within a span."""

    name: str
    time: int
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Span:
    """One span. Times are nanoseconds since 1970; ids are lower-case hex; `size` is in bytes as it came."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    start: int
    end: int
    failed: bool
    message: str
    attributes: Mapping[str, str]
    links: tuple[Link, ...] = ()
    events: tuple[SpanEvent, ...] = ()
    size: int = 0


@dataclass(slots=True)
class _Trace:
    spans: dict[str, Span] = field(default_factory=dict)
    size: int = 0
    left_out: int = 0


class SpanStore:
    """Keeps spans. `changed` is called after each addition; `changes` counts them."""

    def __init__(self, spans_kept: int, bytes_kept: int, changed: Callable[[], None] = lambda: None) -> None:
        self._spans_kept = spans_kept
        self._bytes_kept = bytes_kept
        self._changed = changed
        self._traces: OrderedDict[str, _Trace] = OrderedDict()
        self.spans = self.bytes = self.changes = 0

    @property
    def traces(self) -> int:
        """How many traces are kept."""
        return len(self._traces)

    def add(self, spans: Iterable[Span]) -> None:
        """Adds spans; one that is there already is replaced."""
        for span in spans:
            trace = self._traces.setdefault(span.trace_id, _Trace())
            self._traces.move_to_end(span.trace_id)
            known = trace.spans.get(span.span_id)
            if known is None and len(trace.spans) >= SPANS_PER_TRACE:
                trace.left_out += 1
                continue
            trace.spans[span.span_id] = span
            more = span.size - (known.size if known else 0)
            trace.size += more
            self.bytes += more
            self.spans += known is None
        while self._traces and (self.spans > self._spans_kept or self.bytes > self._bytes_kept):
            _, oldest = self._traces.popitem(last=False)
            self.spans -= len(oldest.spans)
            self.bytes -= oldest.size
        self.changes += 1
        self._changed()

    def view(self, trace_id: str) -> dict[str, Any] | None:
        """A trace as the page is told of it; None if no span of it is kept."""
        trace = self._traces.get(trace_id)
        if trace is None:
            return None
        rows = arranged(trace.spans.values())
        begin = min(span.start for _, span in rows)
        return {
            "trace_id": trace_id,
            "start": begin // 1_000_000,
            "duration": (max(span.end for _, span in rows) - begin) / 1e6,
            "left_out": trace.left_out,
            "spans": [{**_view(span, begin), "depth": depth, "links": self._links(span)} for depth, span in rows],
        }

    def _links(self, span: Span) -> list[dict[str, Any]]:
        found = []
        for link in span.links:
            trace = self._traces.get(link.trace_id)
            other = trace.spans.get(link.span_id) if trace else None
            found.append({"trace_id": link.trace_id, "span_id": link.span_id, "name": other.name if other else ""})
        return found


def arranged(spans: Iterable[Span]) -> list[tuple[int, Span]]:
    """Spans of one trace in the order of rows, each with its depth."""
    by_id = {span.span_id: span for span in spans}
    children: dict[str, list[Span]] = defaultdict(list)
    for span in by_id.values():
        children[span.parent_id if span.parent_id in by_id else ""].append(span)
    rows: list[tuple[int, Span]] = []
    waiting = [(0, span) for span in _last_first(children.pop("", []))]
    while waiting:
        depth, span = waiting.pop()
        rows.append((depth, span))
        waiting += [(depth + 1, child) for child in _last_first(children.pop(span.span_id, []))]
    # Spans that are each other's parents are nobody's children.
    seen = {span.span_id for _, span in rows}
    return rows + [(0, span) for span in by_id.values() if span.span_id not in seen]


def _last_first(spans: list[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: (span.start, -span.end))[::-1]


def _view(span: Span, begin: int) -> dict[str, Any]:
    return {
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "service": span.service,
        "name": span.name,
        "kind": span.kind,
        "offset": (span.start - begin) / 1e6,
        "duration": (span.end - span.start) / 1e6,
        "failed": span.failed,
        "message": span.message,
        "attributes": dict(span.attributes),
        "events": [
            {"name": one.name, "offset": (one.time - begin) / 1e6, "attributes": dict(one.attributes)}
            for one in span.events
        ],
    }
