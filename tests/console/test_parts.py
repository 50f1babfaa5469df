"""The parts that remember: spans, the ring of events and its pages, where a feed is begun."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from console import beginning, otlp
from console.live import Live
from console.spans import SPANS_PER_TRACE, Link, Span, SpanStore, arranged
from console.standing import Seen, judged
from tests.harness import Database, Services
from tidings.client import User, UserEvent, Users, connect


def _span(trace: str, name: str, parent: str = "", start: int = 0, end: int = 10, size: int = 100, **rest: Any) -> Span:
    return Span(trace, name, parent, "s", name, "INTERNAL", start, end, False, "", {}, size=size, **rest)


def test_spans_are_arranged_by_parent_and_time() -> None:
    spans = [
        _span("t", "call", "of-the-caller", 0, 50),
        _span("t", "late", "call", 30, 40),
        _span("t", "early", "call", 5, 9),
        _span("t", "inner", "early", 6, 7),
        _span("t", "later", "call", 30, 35),
    ]
    expected = [(0, "call"), (1, "early"), (2, "inner"), (1, "late"), (1, "later")]
    for _ in range(20):
        random.shuffle(spans)
        assert [(depth, span.name) for depth, span in arranged(spans)] == expected
    # Spans that name each other are shown, and end.
    assert len(arranged([_span("t", "a", "b"), _span("t", "b", "a"), _span("t", "c", "c")])) == 3


def test_spans_are_bounded_in_number_and_in_bytes_and_the_quietest_trace_goes() -> None:
    store = SpanStore(10, 1000)
    for number in range(5):
        store.add([_span(f"t{number}", f"{number}-{one}") for one in range(2)])
    store.add([_span("t0", "again")])
    assert (store.spans, store.bytes, store.traces) == (9, 900, 4)
    assert store.view("t1") is None
    assert [span["name"] for span in (store.view("t0") or {})["spans"]] == ["0-0", "0-1", "again"]
    # What comes twice counts once.
    store.add([_span("t0", "again", size=200)])
    assert (store.spans, store.bytes) == (9, 1000)
    store.add([_span("big", "big", size=900)])
    assert (store.spans, store.bytes, store.traces) == (1, 900, 1)
    many = SpanStore(10_000, 1 << 30)
    many.add(_span("import", str(number)) for number in range(SPANS_PER_TRACE + 7))
    assert (many.view("import") or {})["left_out"] == 7


def test_links_are_named_if_the_other_span_is_kept() -> None:
    store = SpanStore(10, 1000)
    store.add(
        [_span("batch", "commit batch"), _span("t", "wait", links=(Link("batch", "commit batch"), Link("x", "y")))]
    )
    [span] = (store.view("t") or {})["spans"]
    assert [link["name"] for link in span["links"]] == ["commit batch", ""]


def test_what_comes_by_otlp_is_cut_to_what_is_shown() -> None:
    request = trace_service_pb2.ExportTraceServiceRequest()
    spans = request.resource_spans.add()
    spans.resource.attributes.add(key="service.name").value.string_value = "tidings-users"
    scope = spans.scope_spans.add()
    good = scope.spans.add(trace_id=b"t" * 16, span_id=b"s" * 8, name="x" * 5000, kind=2)
    for number in range(100):
        good.attributes.add(key=f"k{number}").value.int_value = number
    good.start_time_unix_nano, good.end_time_unix_nano = 20, 10
    scope.spans.add(trace_id=b"short", span_id=b"s" * 8)
    [found] = otlp.spans_of(request)
    assert (found.service, found.kind, len(found.name), len(found.attributes)) == ("tidings-users", "SERVER", 1000, 64)
    assert found.end == found.start


def _events(first: int, last: int) -> list[UserEvent]:
    return [UserEvent(position=number, user=User(username=f"u{number}")) for number in range(first, last + 1)]


async def test_a_slow_page_skips_and_is_told_how_much() -> None:
    live = Live(10, 2, dict)
    live.add(_events(1, 4))
    with live.browser() as quick, live.browser() as slow, live.browser() as refused:
        assert quick is not None
        assert slow is not None
        assert refused is None
        pages = {"quick": quick.messages(), "slow": slow.messages()}
        for page in pages.values():
            message = await anext(page)
            assert [event["position"] for event in message["events"]] == [1, 2, 3, 4]
            assert message["reset"]
        live.add(_events(5, 8))
        assert [event["position"] for event in (await anext(pages["quick"]))["events"]] == [5, 6, 7, 8]
        # The other takes nothing while 30 come: nothing waits for it anywhere but in the ring.
        live.add(_events(9, 38))
        message = await anext(pages["slow"])
        assert ([event["position"] for event in message["events"]], message["skipped"]) == ([*range(29, 39)], 24)
        assert not message["reset"]
        # Another log, or the same one from elsewhere: all is told anew.
        live.begin_anew()
        live.add(_events(3, 4))
        message = await anext(pages["slow"])
        assert ([event["position"] for event in message["events"]], message["reset"]) == ([3, 4], True)
        assert (live.event(3), live.event(2), live.event(5)) == (_events(3, 3)[0], None, None)
        live.close()
        assert [message async for message in pages["slow"]] == []
    with live.browser() as late:
        assert late is None


async def test_a_page_that_nothing_happens_to_hears_that_all_is_well() -> None:
    live = Live(10, 1, dict)
    with live.browser() as page:
        assert page is not None
        messages = page.messages()
        await anext(messages)
        async with asyncio.timeout(20):
            assert (await anext(messages))["events"] == []


def _standings() -> Iterator[tuple[Seen, str]]:
    yield Seen(), "unknown"
    yield Seen(liveness=True, readiness=True), "up"
    yield Seen(liveness=True, readiness=False), "not ready"
    yield Seen(liveness=False, readiness=True), "not ready"
    yield Seen(health_error="refused"), "down"
    yield Seen(health_error="refused", call=("UNAVAILABLE", "refused")), "down"
    yield Seen(liveness=True, readiness=True, call=("DEADLINE_EXCEEDED", "")), "no answer"
    yield Seen(liveness=True, readiness=True, call=("PERMISSION_DENIED", "no")), "refused"
    # One call that failed while health says well: the next will tell.
    yield Seen(liveness=True, readiness=True, call=("UNAVAILABLE", "")), "up"


def test_the_cause_is_told_without_the_way_down_to_it() -> None:
    error = "connections to all backends failing; last error: UNKNOWN: ipv4:127.0.0.1:1: connect: Connection refused"
    assert judged(Seen(health_error=error)) == ("down", "Connection refused")


def test_how_a_service_stands_follows_from_health_and_answers() -> None:
    assert [judged(seen)[0] for seen, _ in _standings()] == [state for _, state in _standings()]


async def test_a_long_feed_is_begun_near_its_end(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    async with connect(service.address) as channel:
        assert await beginning.find(channel, 2) == "earliest"
        users = Users(channel)
        for batch in range(2):
            await asyncio.sleep(1.2 * batch)
            await users.create_batch(
                User(username=f"u{batch}-{number}", email=f"u{batch}-{number}@example.com") for number in range(50)
            )
        assert await beginning.find(channel, 3) == "earliest"
        # Of 100 events 80 may be read for 2 that are wanted: the second batch alone.
        start = await beginning.find(channel, 2)
        assert isinstance(start, datetime)
        assert (await users.feed()).head_position - await beginning._position_at(channel, start) == 50
