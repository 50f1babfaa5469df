"""The table of parts: what runs, with which settings, where, and how it is asked whether it is ready."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from devstack import postgres
from devstack.console import Console
from devstack.settings import DevstackSettings
from devstack.supervisor import ChildProcess, Part, PartFailedError, Running, outcome
from servicekit.settings import variable

_ASK_TIMEOUT = 2.0
_LINK_KEY_BYTES = 32

USERS = "user-service"
NOTIFICATIONS = "notification-service"
MAIL = "mail-catcher"
CONSOLE = "console"
POSTGRES = "postgres"
MIGRATIONS = "migrations"

# Database and role have the same name.
USERS_DATABASE = "tidings_users"
NOTIFICATIONS_DATABASE = "tidings_notifications"


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a part listens on, and the setting to change it by."""

    part: str
    number: int
    setting: str


# By the field of its port.
_PORTS = {
    "users_port": USERS,
    "notifications_port": NOTIFICATIONS,
    "smtp_port": MAIL,
    "console_port": CONSOLE,
    "otlp_port": CONSOLE,
    "users_metrics_port": USERS,
    "notifications_metrics_port": NOTIFICATIONS,
    "pages_port": NOTIFICATIONS,
}


def ports(settings: DevstackSettings) -> tuple[Port, ...]:
    """Every port of the system."""
    return tuple(
        Port(part, getattr(settings, field), variable(DevstackSettings, field)) for field, part in _PORTS.items()
    )


def listen_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def ask_health(address: str) -> str | None:
    """Asks a gRPC server for its readiness: None, or why it is not ready."""
    # Imported late: most of the start-up time of this process, and spent while Postgres starts.
    import grpc.aio
    from grpc_health.v1 import health_pb2

    async with grpc.aio.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(service="readiness"), timeout=_ASK_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def ask_smtp(host: str, port: int) -> str | None:
    """Asks an SMTP server for its greeting: None, or why it is not ready."""
    try:
        async with asyncio.timeout(_ASK_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                greeting = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return str(error) or "no answer"
    return None if greeting.startswith(b"220") else f"greets with {greeting!r}"


async def ask_http(host: str, port: int) -> str | None:
    """Asks a web server for its /healthz: None, or why it is not ready."""
    try:
        async with asyncio.timeout(_ASK_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return str(error) or "no answer"
    return None if b" 200 " in status else f"answers with {status!r}"


async def _is_ready() -> str | None:
    return None


def postgres_part(settings: DevstackSettings, console: Console, started: Callable[[postgres.Postgres], None]) -> Part:
    """Postgres; `started` is told of each server that was started or adopted."""

    async def start() -> Running:
        server = await postgres.start((settings.data_dir / "postgres").absolute())
        if server.adopted:
            console.say(f"{POSTGRES} was left over from a killed run and is adopted (pid {server.pid})")
        started(server)
        return server

    # `start` returns when the server answers.
    return Part(POSTGRES, start, _is_ready)


def _process(
    settings: DevstackSettings,
    console: Console,
    name: str,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    ready: Callable[[], Awaitable[str | None]],
) -> Part:
    async def start() -> Running:
        return await ChildProcess.start(
            name, (sys.executable, "-m", *arguments), _with_logs(environment), console, settings.stop_time
        )

    return Part(name, start, ready)


def _with_logs(environment: Mapping[str, str]) -> dict[str, str]:
    # Lines for people, although the parts write to a pipe, unless the user asks for another form.
    return {"TIDINGS_LOG_FORMAT": os.environ.get("TIDINGS_LOG_FORMAT", "console"), **environment}


def mail_part(settings: DevstackSettings, console: Console) -> Part:
    """The mail catcher."""

    async def ready() -> str | None:
        return await ask_smtp(settings.host, settings.smtp_port)

    return _process(settings, console, MAIL, ("devstack", "mail-catcher"), {}, ready)


def _urls(server: postgres.Postgres) -> dict[str, str]:
    return {
        "TIDINGS_USERS_DATABASE_URL": server.url(USERS_DATABASE, USERS_DATABASE),
        "TIDINGS_NOTIFICATIONS_DATABASE_URL": server.url(NOTIFICATIONS_DATABASE, NOTIFICATIONS_DATABASE),
    }


def _spans_go_elsewhere() -> bool:
    """Whether whoever starts the system has a receiver of their own."""
    return any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("ENDPOINT", "TRACES_ENDPOINT"))


def _tracing(settings: DevstackSettings) -> dict[str, str]:
    """What makes a service send its spans to the console, soon."""
    if _spans_go_elsewhere():
        return {}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{listen_address(settings.host, settings.otlp_port)}",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "500",
    }


def console_part(settings: DevstackSettings, console: Console) -> Part:
    """The console, which takes the services' spans."""
    environment = {
        "TIDINGS_CONSOLE_LISTEN": listen_address(settings.host, settings.console_port),
        "TIDINGS_CONSOLE_USERS_ADDRESS": listen_address(settings.host, settings.users_port),
        "TIDINGS_CONSOLE_NOTIFICATIONS_ADDRESS": listen_address(settings.host, settings.notifications_port),
    }
    if not _spans_go_elsewhere():
        environment["TIDINGS_CONSOLE_OTLP_LISTEN"] = listen_address(settings.host, settings.otlp_port)

    async def ready() -> str | None:
        return await ask_http(settings.host, settings.console_port)

    return _process(settings, console, CONSOLE, ("console", "serve"), environment, ready)


def _links(settings: DevstackSettings) -> dict[str, str]:
    """What makes links in mails lead to the service itself; the key is made once, as old mails are kept as well."""
    pages_at = listen_address(settings.host, settings.pages_port)
    made = {"TIDINGS_NOTIFICATIONS_HTTP_LISTEN": pages_at}
    if any(os.environ.get(f"TIDINGS_NOTIFICATIONS_{name}") for name in ("PUBLIC_URL", "LINK_KEYS_FILE")):
        return made
    if not settings.link_keys.exists():
        # A run that is killed leaves no half of a file under its name.
        unfinished = settings.link_keys.with_suffix(".new")
        unfinished.touch(mode=0o600)
        unfinished.write_text(f"{base64.b64encode(secrets.token_bytes(_LINK_KEY_BYTES)).decode()}\n")
        unfinished.replace(settings.link_keys)
    return made | {
        "TIDINGS_NOTIFICATIONS_PUBLIC_URL": f"http://{pages_at}",
        "TIDINGS_NOTIFICATIONS_LINK_KEYS_FILE": str(settings.link_keys.absolute()),
    }


def service_parts(settings: DevstackSettings, console: Console, server: postgres.Postgres) -> tuple[Part, ...]:
    """The two services. What is not set here passes through from the environment."""
    tracing = _tracing(settings)
    users_at = listen_address(settings.host, settings.users_port)
    notifications_at = listen_address(settings.host, settings.notifications_port)
    urls = _urls(server)
    users = {
        **tracing,
        "TIDINGS_USERS_DATABASE_URL": urls["TIDINGS_USERS_DATABASE_URL"],
        "TIDINGS_USERS_LISTEN": users_at,
        "TIDINGS_USERS_METRICS_ADDRESS": listen_address(settings.host, settings.users_metrics_port),
    }
    notifications = {
        **tracing,
        **_links(settings),
        "TIDINGS_NOTIFICATIONS_DATABASE_URL": urls["TIDINGS_NOTIFICATIONS_DATABASE_URL"],
        "TIDINGS_NOTIFICATIONS_LISTEN": notifications_at,
        "TIDINGS_NOTIFICATIONS_METRICS_ADDRESS": listen_address(settings.host, settings.notifications_metrics_port),
        "TIDINGS_NOTIFICATIONS_USERS_ADDRESS": users_at,
        "TIDINGS_NOTIFICATIONS_SMTP_HOST": settings.host,
        "TIDINGS_NOTIFICATIONS_SMTP_PORT": str(settings.smtp_port),
        # A developer's endpoints are on this machine.
        "TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS": os.environ.get(
            "TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS", "127.0.0.0/8 ::1"
        ),
    }
    return (
        _process(settings, console, USERS, ("user_service", "serve"), users, lambda: ask_health(users_at)),
        _process(
            settings, console, NOTIFICATIONS, ("notification_service", "serve"), notifications,
            lambda: ask_health(notifications_at),
        ),
    )  # fmt: skip


async def migrate(settings: DevstackSettings, console: Console, server: postgres.Postgres) -> None:
    """Makes the databases and migrates them. Raises PartFailedError."""
    console.say("migrating the databases")
    for name in (USERS_DATABASE, NOTIFICATIONS_DATABASE):
        await postgres.ensure_database(server, name, role=name)
    process = await ChildProcess.start(
        MIGRATIONS,
        (sys.executable, "-m", "migrations", "upgrade", "all"),
        _with_logs(_urls(server)),
        console,
        settings.stop_time,
    )
    try:
        code = await process.exit_code()
    finally:
        await process.stop()
    if code != 0:
        raise PartFailedError(MIGRATIONS, outcome(code))
