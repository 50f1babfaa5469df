"""The whole system in the foreground: what starts in which order, and what stops in which.

Start: Postgres, then the mail catcher, migrations, the console and the services. Stop: the services, the console, the
mail catcher, Postgres. A part is stopped only when all that lean on it are gone, whatever ends the run: a signal, a
failed part, an error here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from devstack import parts, postgres
from devstack.console import Console
from devstack.settings import DevstackSettings
from devstack.supervisor import Part, PartFailedError, kept

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class RefusedError(Exception):
    """The run must not begin; the message says why."""


def check_ports(settings: DevstackSettings) -> None:
    """Raises RefusedError if a port is asked for twice, taken, or not allowed."""
    problems = []
    seen: dict[int, parts.Port] = {}
    for port in parts.ports(settings):
        if (other := seen.setdefault(port.number, port)) is not port:
            problems.append(f"{port.setting} and {other.setting} both say {port.number}")
            continue
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, port.number))
                probe.listen()
            except OSError as error:
                where = f"port {port.number} on {settings.host} for the {port.part}"
                why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror or error})"
                problems.append(f"{where} {why}; choose another with {port.setting}=PORT")
    if problems:
        raise RefusedError("\n".join(problems))


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Holds the data directory for this process; the kernel lets go of it at the process's end, however it ends."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("a+")
    except OSError as error:
        raise RefusedError(
            f"{data_dir} cannot be used: {error.strerror}; choose another with TIDINGS_DEVSTACK_DATA_DIR=DIR"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RefusedError(
                f"{data_dir} is in use by another run (pid {lock.read().strip() or 'unknown'}); "
                "stop it or choose another directory with TIDINGS_DEVSTACK_DATA_DIR=DIR"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _exports(settings: DevstackSettings) -> list[str]:
    """What the command line must be told, where this run differs from its defaults."""
    table = {
        "TIDINGS_CLIENT_USERS_ADDRESS": (parts.listen_address(settings.host, settings.users_port), "127.0.0.1:50051"),
        "TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS": (
            parts.listen_address(settings.host, settings.notifications_port),
            "127.0.0.1:50052",
        ),
        "TIDINGS_CLIENT_MAIL_DIR": (str(settings.mail_dir), ".tidings/mail"),
    }
    return [f"  export {name}={value}" for name, (value, default) in table.items() if value != default]


def _welcome(settings: DevstackSettings, server: postgres.Postgres, seconds: float) -> list[str]:
    users_at = parts.listen_address(settings.host, settings.users_port)
    notifications_at = parts.listen_address(settings.host, settings.notifications_port)
    console_at = parts.listen_address(settings.host, settings.console_port)
    smtp_at = parts.listen_address(settings.host, settings.smtp_port)
    pages_at = parts.listen_address(settings.host, settings.pages_port)
    metrics_at = [
        parts.listen_address(settings.host, port)
        for port in (settings.users_metrics_port, settings.notifications_metrics_port)
    ]
    return [
        f"Tidings is ready, {seconds:.1f} s after its start.",
        f"  console               http://{console_at}/",
        f"  user service          {users_at}  (gRPC tidings.users.v1.UserService)",
        f"  notification service  {notifications_at}  (gRPC tidings.notifications.v1.NotificationService)",
        f"  mail catcher          {smtp_at}  (SMTP; messages in {settings.mail_dir})",
        f"  links in mails        http://{pages_at}/u/...",
        *(f"  metrics               http://{at}/metrics" for at in metrics_at),
        f"  postgres              {server.url(postgres.SUPERUSER, parts.USERS_DATABASE)}",
        "",
        "In another terminal:",
        *_exports(settings),
        "  .venv/bin/tidings users watch",
        "  .venv/bin/tidings users create --username zoe --email zoe@example.com --display-name 'Zoë Ångström'",
        "  .venv/bin/tidings mail list",
        "  .venv/bin/tidings doctor",
        f"Ctrl-C stops everything; the data stays in {settings.data_dir}.",
    ]


@contextlib.asynccontextmanager
async def _background(*tasks: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _up(settings: DevstackSettings, console: Console, failed: asyncio.Future[None]) -> None:
    """Brings everything up and stays; a cancellation takes it down in order."""
    began = time.monotonic()
    servers: list[postgres.Postgres] = []

    async with contextlib.AsyncExitStack() as stack:

        async def keep(*members: Part) -> Callable[[], Awaitable[None]]:
            layer = kept(*members, console=console, late_after=settings.late_after, failed=failed)
            return await stack.enter_async_context(layer)

        postgres_ready = await keep(parts.postgres_part(settings, console, servers.append))
        await postgres_ready()
        server = servers[0]
        following = asyncio.create_task(postgres.follow_log(server.log_path, console, parts.POSTGRES))
        await stack.enter_async_context(_background(following))
        mail_ready = await keep(parts.mail_part(settings, console))
        await parts.migrate(settings, console, server)
        # Before the services and longer than they: it takes their spans, the last ones too.
        console_ready = await keep(parts.console_part(settings, console))
        services_ready = await keep(*parts.service_parts(settings, console, server))
        for ready in (mail_ready, services_ready, console_ready):
            await ready()
        console.block(_welcome(settings, server, time.monotonic() - began))
        await asyncio.Event().wait()


async def _run(settings: DevstackSettings, console: Console) -> int:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for signum in _SIGNALS:
        loop.add_signal_handler(signum, stopped.set)
    failed: asyncio.Future[None] = loop.create_future()
    up = asyncio.create_task(_up(settings, console, failed))
    stop = asyncio.create_task(stopped.wait())
    waits: list[asyncio.Future[Any]] = [up, stop, failed]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    failure = next((done.exception() for done in (failed, up) if done.done()), None)
    console.say(f"failed: {failure}; stopping" if failure else "stopping")
    stop.cancel()
    up.cancel()
    await asyncio.gather(up, stop, return_exceptions=True)
    if failure is None:
        console.say(f"stopped; the data is in {settings.data_dir}")
        return 0
    console.say(f"ended, because {failure}")
    if not isinstance(failure, PartFailedError):
        raise failure
    return 1


def run(settings: DevstackSettings, console: Console) -> int:
    """`make run`: returns the exit code."""
    try:
        with locked(settings.data_dir):
            check_ports(settings)
            return asyncio.run(_run(settings, console))
    except RefusedError as error:
        for line in str(error).splitlines():
            console.say(f"error: {line}")
        return 1
