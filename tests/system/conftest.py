"""The whole system as processes: user service, notification service, mail catcher, and a receiver of webhooks."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
from aiohttp import web

from tests.harness import Database, MailCatcher, ServiceProcess, Services
from tests.users.calls import Stub, stub_of
from tidings.client import Notifications, connect


@dataclass
class Webhooks:
    """What an endpoint received: each call's headers and body."""

    url: str = ""
    secret: str = field(default_factory=lambda: "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode())
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def receive(self, request: web.Request) -> web.Response:
        """Answers 204."""
        self.calls.append((dict(request.headers), await request.read()))
        return web.Response(status=204)


@pytest.fixture
async def webhooks() -> AsyncIterator[Webhooks]:
    """A running receiver."""
    received = Webhooks()
    app = web.Application()
    app.router.add_post("/hook", received.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    received.url = f"http://127.0.0.1:{port}/hook"
    yield received
    await runner.cleanup()


@dataclass
class System:
    """The running processes and how to talk to them."""

    users: ServiceProcess
    notifications: ServiceProcess
    mail: MailCatcher
    webhooks: Webhooks
    users_database: Database
    notifications_database: Database

    @property
    def stub(self) -> Stub:
        """The user service."""
        return stub_of(self.users)

    @property
    def channel(self) -> grpc.aio.Channel:
        """A channel to the notification service."""
        return connect(self.notifications.address)

    @property
    def api(self) -> Notifications:
        """The notification service."""
        return Notifications(self.channel)


@pytest.fixture
async def system(
    services: Services,
    users_database: Database,
    notifications_database: Database,
    mail_catcher: MailCatcher,
    webhooks: Webhooks,
    tmp_path: Path,
) -> System:
    """Everything started and ready. A dead replica's deliveries are taken over after 4 s."""
    endpoints = tmp_path / "webhooks.toml"
    endpoints.write_text(f'[[endpoints]]\nname = "test"\nurl = "{webhooks.url}"\nsecret = "{webhooks.secret}"\n')
    users = await services.users(users_database).start()
    notifications = await services.notifications(
        notifications_database,
        users,
        mail_catcher,
        webhooks_file=endpoints,
        webhook_networks="127.0.0.0/8",
        lease=4,
        send_timeout=2,
    ).start()
    return System(users, notifications, mail_catcher, webhooks, users_database, notifications_database)
