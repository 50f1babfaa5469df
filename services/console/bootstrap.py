"""The composition root: makes every part of the console, joins them, and takes them apart in order.

At SIGTERM the pages' streams end, then the servers, then the loops. If a loop dies the same happens, with exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import uvicorn
from starlette.types import ASGIApp

from console import app, otlp, watching
from console.live import Live
from console.settings import ConsoleSettings
from console.spans import SpanStore
from console.standing import Standing
from servicekit import listening, logs, tasks
from servicekit.addresses import is_loopback
from servicekit.configfile import InvalidConfigError
from servicekit.settings import variable
from servicekit.tasks import Background
from tidings.client import connect

log = logs.get(__name__)

NAME = "tidings-console"

_SERVICES = ("users", "notifications")

# What requests get to end at a shutdown, seconds; streams end at once.
_GRACE = 1


class _Server(uvicorn.Server):
    """Leaves signals to whoever composes it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: ConsoleSettings) -> int:
    """Runs the console until it is told to stop. Returns the exit code. Raises InvalidConfigError."""
    async with contextlib.AsyncExitStack() as stack:
        ways = [await stack.enter_async_context(_connected(settings, name)) for name in _SERVICES]
        # Health is asked of services that take no calls, too.
        healths = [await stack.enter_async_context(_connected(settings, name, heed_health=False)) for name in _SERVICES]
        return await _serve(settings, ways, healths)


def _connected(settings: ConsoleSettings, service: str, *, heed_health: bool = True) -> grpc.aio.Channel:
    """The way to a service."""

    def setting(name: str) -> Any:
        return getattr(settings, f"{service}_{name}")

    try:
        return connect(
            setting("address"),
            token_file=setting("token_file"),
            tls=setting("tls"),
            ca=setting("ca_file"),
            certificate=setting("certificate_file"),
            key=setting("key_file"),
            token_in_clear=settings.encrypted_elsewhere,
            heed_health=heed_health,
        )
    except (ValueError, OSError) as error:
        raise InvalidConfigError(f"{variable(type(settings), f'{service}_*')}: {error}") from None


async def _serve(
    settings: ConsoleSettings, ways: Sequence[grpc.aio.Channel], healths: Sequence[grpc.aio.Channel]
) -> int:
    users, notifications = ways
    background = Background()
    standings = {
        "users": Standing("User service", settings.users_address, lambda: users_changed()),
        "notifications": Standing("Notification service", settings.notifications_address, lambda: live.touch()),
    }

    def status() -> dict[str, Any]:
        return {
            "now": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "services": {key: standing.view() for key, standing in standings.items()},
            "feed": feed.view(),
            "inbox": inbox.view(),
            "spans": {"spans": spans.spans, "traces": spans.traces, "bytes": spans.bytes} if spans else None,
        }

    live = Live(settings.events_kept, settings.max_browsers, status)
    feed = watching.FeedWatch(users, live, settings.events_kept)
    inbox = watching.InboxWatch(notifications, live)

    def users_changed() -> None:
        if standings["users"].state == "up":
            feed.reconnect()
        live.touch()

    def spans_changed() -> None:
        live.changes.spans += 1
        live.touch()

    spans = SpanStore(settings.spans_kept, settings.span_bytes_kept, spans_changed) if settings.otlp_listen else None

    def healthy() -> bool:
        return background.alive and not live.closed

    parts = app.Parts(live, spans, notifications, _config(settings), healthy)
    servers = {"address": (settings.listen, app.make(parts, settings.host_names))}
    if settings.health_listen:
        servers["health_address"] = (settings.health_listen, app.health_only(healthy))
    with contextlib.ExitStack() as stack:
        sockets = {name: listening.bound(address) for name, (address, _) in servers.items()}
        for one in filter(None, sockets.values()):
            stack.enter_context(one)
        receiver = otlp.receiver(settings.otlp_listen, spans) if spans else None
        if None in sockets.values() or (spans and receiver is None):
            return 1
        if receiver:
            await receiver.start()
        for name, health, ask in zip(_SERVICES, healths, (feed.ask, inbox.ask), strict=True):
            background.start(watching.follow_readiness(health, standings[name]), f"{name} readiness")
            background.start(watching.follow_answers(health, ask, standings[name]), f"{name} answers")
        background.start(feed.follow(), "feed")
        runs = [_Running(made, sockets[name]) for name, (_, made) in servers.items()]
        if not is_loopback(settings.listen):
            log.warning("beyond this machine: something else must let only operators through", address=settings.listen)
        log.info("serving", **{name: listening.address_of(one) for name, one in sockets.items() if one})
        await background.until_over(tasks.told_to_stop(), *(run.task for run in runs))
        live.close()
        await asyncio.gather(*(run.stop() for run in runs))
        if receiver:
            await receiver.stop(0)
        await background.stop()
    log.info("stopped")
    return 1 if background.failure else 0


class _Running:
    """A web server that runs."""

    def __init__(self, made: ASGIApp, bound: socket.socket | None) -> None:
        config = uvicorn.Config(
            made,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE,
        )
        self._server = _Server(config)
        self.task = asyncio.create_task(self._server.serve([bound] if bound else None))

    async def stop(self) -> None:
        """Ends it; requests that run get a moment."""
        self._server.should_exit = True
        await self.task


def _command() -> str:
    """The command line as one calls it from where this process was started."""
    if shutil.which("tidings"):
        return "tidings"
    beside = Path(sys.executable).with_name("tidings")
    here = Path.cwd()
    return str(beside.relative_to(here)) if beside.is_relative_to(here) else str(beside)


def _config(settings: ConsoleSettings) -> dict[str, Any]:
    """What the page is told once."""
    create = f"{_command()} users create --username zoe --email zoe@example.com --display-name 'Zoë Ångström'"
    # Elsewhere the command line has its own way to the services.
    if settings.users_address != type(settings).model_fields["users_address"].default and is_loopback(
        settings.users_address
    ):
        create += f" --users {settings.users_address}"
    return {
        "keeps_spans": bool(settings.otlp_listen),
        "jaeger_url": settings.jaeger_url,
        "events_kept": settings.events_kept,
        "create_command": create,
    }
