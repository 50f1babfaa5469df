"""The routes: the page's files, its live stream (server-sent events), what it asks for, and the two things it does."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from console import actions, views
from console.live import Live
from console.security import HEALTH_PATH, Guard
from console.spans import SpanStore
from tidings.client import ApiError, Notifications
from tidings.notifications.v1 import notifications_pb2

STATIC = Path(__file__).with_name("static")

_LONGEST_BODY = 64 << 10
_PAGE, _LONGEST_PAGE = 50, 500
_FEW = 3
_READ_TIMEOUT = 5.0
# How soon a browser asks again for a stream that ended, milliseconds.
_RECONNECT = 500

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_Delivery = notifications_pb2.Delivery
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes stand on. `config` is told to the page once; `spans` is None where it keeps none."""

    live: Live
    spans: SpanStore | None
    notifications: grpc.aio.Channel
    config: dict[str, Any]
    healthy: Callable[[], bool]

    @property
    def reads(self) -> Notifications:
        """The notification service, for what an operator waits for."""
        return Notifications(self.notifications, timeout=_READ_TIMEOUT)


def make(parts: Parts, hosts: frozenset[str]) -> ASGIApp:
    """The application, behind its guard: no answer gets round it, that of an unexpected error neither."""

    def with_parts(handler: Callable[[Parts, Request], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            return await handler(parts, request)

        return handle

    def route(path: str, handler: Callable[[Parts, Request], Awaitable[Response]], method: str = "GET") -> Route:
        return Route(path, with_parts(handler), methods=[method])

    routes = Starlette(
        routes=[
            Route("/", _index),
            Mount("/static", StaticFiles(directory=STATIC)),
            route(HEALTH_PATH, _health),
            route("/api/live", _live),
            route("/api/events/{position:int}", _event),
            route("/api/notifications", _notifications),
            route("/api/deliveries", _deliveries),
            route("/api/traces/{trace_id}", _trace),
            route("/api/deliveries/replay", _replay, "POST"),
            route("/api/deliveries/discard", _discard, "POST"),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    return Guard(routes, hosts)


def health_only(healthy: Callable[[], bool]) -> ASGIApp:
    """/healthz and nothing else."""

    async def health(_: Request) -> Response:
        return _health_answer(healthy())

    return Starlette(routes=[Route(HEALTH_PATH, health)])


def _health_answer(healthy: bool) -> Response:
    return PlainTextResponse("ok" if healthy else "stopping", status_code=200 if healthy else 503)


async def _index(_: Request) -> Response:
    return FileResponse(STATIC / "index.html", media_type="text/html")


async def _health(parts: Parts, _: Request) -> Response:
    return _health_answer(parts.healthy())


async def _live(parts: Parts, _: Request) -> Response:
    async def stream() -> AsyncIterator[str]:
        with parts.live.browser() as browser:
            yield f"retry: {_RECONNECT}\n\n"
            if browser is None:
                yield _sent("full", {})
                return
            yield _sent("config", parts.config)
            async for message in browser.messages():
                yield _sent("update", message)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _sent(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _event(parts: Parts, request: Request) -> Response:
    """Null if it is not among the newest, which alone are kept."""
    event = parts.live.event(request.path_params["position"])
    return JSONResponse({"event": event and views.event_detail(event)})


async def _notifications(parts: Parts, request: Request) -> Response:
    """Newest first, each with its deliveries."""
    asked, limit = request.query_params, _limit(request)
    found, more = await _first(
        parts.reads.list(
            event_id=asked.get("event_id", ""), user_id=asked.get("user_id", ""), page_size=min(limit + 1, 1000)
        ),
        limit,
    )
    deliveries = await _deliveries_of(parts.reads, found)
    rows = [{**views.notification(one), "deliveries": deliveries.get(one.id, [])} for one in found]
    return JSONResponse({"notifications": rows, "more": more})


async def _deliveries_of(
    reads: Notifications, notifications: list[notifications_pb2.Notification]
) -> dict[str, list[views.View]]:
    """By notification. Few are asked for one by one; many are joined with the deliveries that are as new as they."""
    found: dict[str, list[views.View]] = {}
    if len(notifications) <= _FEW:
        for one in notifications:
            found[one.id] = [views.delivery(delivery) async for delivery in reads.deliveries(notification_id=one.id)]
        return found
    oldest = min(one.create_time.ToNanoseconds() for one in notifications)
    async with aclosing(reads.deliveries(page_size=200)) as newest:
        async for delivery in newest:
            if delivery.create_time.ToNanoseconds() < oldest:
                break
            found.setdefault(delivery.notification_id, []).append(views.delivery(delivery))
    return found


async def _deliveries(parts: Parts, request: Request) -> Response:
    """Newest first."""
    asked, limit = request.query_params, _limit(request)
    state = asked.get("state", "").upper()
    if state and state not in _Delivery.State.keys():  # noqa: SIM118 - the enum is no dict
        raise HTTPException(400, "state: no such state")
    listed = parts.reads.deliveries(
        notification_id=asked.get("notification_id", ""),
        state=_Delivery.State.Value(state) if state else _Delivery.STATE_UNSPECIFIED,
        page_size=min(limit + 1, 1000),
    )
    found, more = await _first(listed, limit)
    return JSONResponse({"deliveries": [views.delivery(one) for one in found], "more": more})


async def _trace(parts: Parts, request: Request) -> Response:
    """Null if no span of it is kept."""
    return JSONResponse({"trace": parts.spans and parts.spans.view(request.path_params["trace_id"])})


async def _replay(parts: Parts, request: Request) -> Response:
    return await _act(parts, request, "replay")


async def _discard(parts: Parts, request: Request) -> Response:
    return await _act(parts, request, "discard")


async def _act(parts: Parts, request: Request, kind: actions.Kind) -> Response:
    try:
        order = actions.parse(kind, json.loads(await _body(request)))
    except (ValueError, actions.InvalidOrderError) as error:
        raise HTTPException(400, str(error)) from None
    done = await actions.carry_out(parts.notifications, order)
    parts.live.changes.deliveries += 1
    parts.live.touch()
    return JSONResponse({"asked": len(order.ids), "done": done})


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY:
            raise HTTPException(413, "the body is too large")
    return body


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(_PAGE))
    if not text.isdecimal() or not 1 <= int(text) <= _LONGEST_PAGE:
        raise HTTPException(400, f"limit: must be 1 to {_LONGEST_PAGE}")
    return int(text)


async def _first(items: AsyncGenerator[_Item, None], limit: int) -> tuple[list[_Item], bool]:
    """The first so many, and whether there are more."""
    found: list[_Item] = []
    async with aclosing(items):
        async for item in items:
            if len(found) == limit:
                return found, True
            found.append(item)
    return found, False


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - it is registered for these
    return JSONResponse(
        {"error": {"code": error.reason, "message": error.message}}, status_code=_CODES.get(error.code, 502)
    )


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these
    return JSONResponse(
        {"error": {"code": str(error.status_code), "message": error.detail}}, status_code=error.status_code
    )
