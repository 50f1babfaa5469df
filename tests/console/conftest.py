"""One running system per module, and a real browser that looks at its console.

The browser is Debian's or whatever Chromium the machine has. With TIDINGS_TEST_SCREENSHOTS=1 the tests also write the
pictures of docs/images.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, async_playwright, expect

from tests.harness import Databases, MailCatcher, PostgresServer, ServiceProcess, Services, free_port, programs
from tests.harness.process import clean_environment
from tidings.client import Notifications, Users, connect

_IMAGES = Path(__file__).parents[2] / "docs" / "images"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

OpenPage = Callable[..., Any]

_PATIENCE = 15_000  # milliseconds
expect.set_options(timeout=_PATIENCE)


@dataclass
class Endpoint:
    """A receiver of webhooks that refuses until it is mended."""

    url: str = ""
    refuses: bool = True
    calls: int = 0

    async def receive(self, _: web.Request) -> web.Response:
        """503, or 204 once it is mended."""
        self.calls += 1
        return web.Response(status=503 if self.refuses else 204)


@dataclass
class Site:
    """The processes. `url` is the console's."""

    users: ServiceProcess
    notifications: ServiceProcess
    console: ServiceProcess
    mail: MailCatcher
    endpoint: Endpoint
    url: str

    async def tidings(self, *arguments: str) -> str:
        """The command line, against this system. Returns what it printed."""
        environment = {
            **clean_environment(),
            "TIDINGS_CLIENT_USERS_ADDRESS": self.users.address,
            "TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS": self.notifications.address,
        }
        process = await programs.start("tidings.cli", *arguments, environment=environment)
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()

    async def create(self, username: str, display_name: str = "") -> None:
        """A user, by the API."""
        async with connect(self.users.address) as channel:
            user = {"username": username, "email": f"{username}@example.com", "display_name": display_name}
            await Users(channel).create(user)

    @asynccontextmanager
    async def api(self) -> AsyncIterator[Notifications]:
        """The notification service."""
        async with connect(self.notifications.address) as channel:
            yield Notifications(channel)


@asynccontextmanager
async def running(postgres: PostgresServer) -> AsyncIterator[Site]:
    """User service, notification service with one webhook endpoint and one attempt, mail catcher and console."""
    async with AsyncExitStack() as stack:
        databases = Databases(postgres)
        stack.push_async_callback(databases.drop)
        folder = Path(tempfile.mkdtemp(prefix="tidings-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        endpoint = Endpoint()
        await _receive(endpoint, stack)
        services = Services()
        stack.push_async_callback(services.stop)
        mail = MailCatcher(folder)
        stack.push_async_callback(mail.stop)
        webhooks = folder / "webhooks.toml"
        webhooks.write_text(
            f'[[endpoints]]\nname = "crm"\nurl = "{endpoint.url}"\n'
            'secret = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="\n'
        )
        listens = f"127.0.0.1:{free_port()}"
        otlp = f"127.0.0.1:{free_port()}"
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{otlp}", "OTEL_METRICS_EXPORTER": "none"}
        traced["OTEL_BSP_SCHEDULE_DELAY"] = "100"
        users_database, notifications_database, _ = await asyncio.gather(
            databases.users(), databases.notifications(), mail.start()
        )
        users = services.process(
            "user_service", "serve",
            environment={**traced, "TIDINGS_USERS_DATABASE_URL": users_database.url, "TIDINGS_USERS_GRACE": "300"},
            listen_variable="TIDINGS_USERS_LISTEN",
        )  # fmt: skip
        await users.start()
        notifications = services.process(
            "notification_service", "serve",
            environment={
                **traced,
                "TIDINGS_NOTIFICATIONS_DATABASE_URL": notifications_database.url,
                "TIDINGS_NOTIFICATIONS_USERS_ADDRESS": users.address,
                "TIDINGS_NOTIFICATIONS_SMTP_PORT": str(mail.port),
                "TIDINGS_NOTIFICATIONS_WEBHOOKS_FILE": str(webhooks),
                "TIDINGS_NOTIFICATIONS_TRIES": "1",
                "TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS": "127.0.0.0/8",
                "TIDINGS_NOTIFICATIONS_LISTEN": listens,
            },
            listen_variable="TIDINGS_NOTIFICATIONS_LISTEN",
        )  # fmt: skip
        console = services.process(
            "console", "serve",
            environment={
                "TIDINGS_CONSOLE_USERS_ADDRESS": users.address,
                "TIDINGS_CONSOLE_NOTIFICATIONS_ADDRESS": listens,
                "TIDINGS_CONSOLE_OTLP_LISTEN": otlp,
            },
            listen_variable="TIDINGS_CONSOLE_LISTEN",
        )  # fmt: skip
        await asyncio.gather(notifications.start(), console.launch())
        url = f"http://{await console.wait_serving()}/"
        yield Site(users, notifications, console, mail, endpoint, url)


async def _receive(endpoint: Endpoint, stack: AsyncExitStack) -> None:
    app = web.Application()
    app.router.add_post("/hook", endpoint.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"


@pytest.fixture(scope="module")
async def site(postgres: PostgresServer) -> AsyncIterator[Site]:
    """The module's system."""
    async with running(postgres) as started:
        yield started


@pytest.fixture(scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """The session's browser."""
    program = next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        # CI installs it; there nothing may go untested.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "there is no Chromium on PATH to look at the console with"
        )
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=_FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
async def open_page(chromium: Browser, site: Site) -> AsyncIterator[OpenPage]:
    """Opens the console at a view; a page on which a script fails, or what it asks for, fails the test."""
    contexts: list[BrowserContext] = []
    trouble: list[str] = []

    def noted(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            trouble.append(f"{message.type}: {message.text}")

    async def opened(view: str = "", url: str = site.url, *, may_complain: bool = False, **options: Any) -> Page:
        context = await chromium.new_context(viewport=options.pop("viewport", None) or SIZE, **options)
        contexts.append(context)
        context.set_default_timeout(_PATIENCE)
        page = await context.new_page()
        if not may_complain:
            page.on("console", noted)
        page.on("pageerror", lambda error: trouble.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: trouble.append(f"a script ran: {dialog.message}"))
        await page.goto(f"{url}{view}")
        await page.locator("#connection[data-state=live]").wait_for()
        return page

    yield opened
    for context in contexts:
        await context.close()
    assert trouble == []


SIZE: Any = {"width": 1280, "height": 800}


async def picture(page: Page, name: str) -> None:
    """Writes a picture of the documents, if pictures were asked for."""
    if os.environ.get("TIDINGS_TEST_SCREENSHOTS"):
        await page.mouse.move(2, 2)
        _IMAGES.mkdir(exist_ok=True)
        await page.screenshot(path=_IMAGES / f"{name}.png", animations="disabled")
