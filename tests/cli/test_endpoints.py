"""`tidings endpoints` against the real service, its Postgres and a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from standardwebhooks import Webhook

from notification_service import egress
from notification_service.api.endpoints import EndpointService
from notification_service.channels.webhook import WebhookChannel
from notification_service.registry import Endpoints
from servicekit import callers, database, guard
from tests.cli.conftest import Ran, Tidings
from tests.harness import Database
from tidings.notifications.v1 import endpoints_pb2_grpc

Command = Tidings


@pytest.fixture
async def command(tidings: Tidings, notifications_database: Database) -> AsyncIterator[Command]:
    """Runs `tidings endpoints` with arguments."""
    networks = (egress.network("127.0.0.0/8"),)
    async with database.pool(notifications_database.url, "tests", size=2) as pool:
        known = Endpoints((), pool)
        channel = WebhookChannel(known, connections=2, timeout=5.0, networks=networks)
        server = grpc.aio.server()
        guard.add(
            server,
            callers.anyone,
            endpoints_pb2_grpc.add_EndpointServiceServicer_to_server,
            EndpointService(pool, known, channel, lambda: None, networks),
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        loop = asyncio.create_task(known.run(1.0))
        await known.loaded()

        async def run(verb: str, *arguments: str) -> Ran:
            return await tidings("endpoints", verb, *arguments, "--notifications", f"127.0.0.1:{port}")

        yield run
        await server.stop(None)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await channel.close()


def fields(ran: Ran) -> dict[str, str]:
    """What a record says."""
    assert (ran.code, ran.err) == (0, "")
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in ran.out.splitlines())


async def create(command: Command, url: str) -> tuple[str, str]:
    """The id and the secret of a new endpoint `crm`."""
    ran = await command("create", "--name", "crm", "--url", url, "--event", "DELETED", "--json")
    assert (ran.code, ran.err) == (0, "")
    made = json.loads(ran.out)
    return made["endpoint"]["id"], made["secret"]


async def test_a_secret_is_shown_once(command: Command) -> None:
    identity, secret = await create(command, "https://crm.example.com/hook")
    assert secret.startswith("whsec_")
    for verb, arguments in (("get", [identity]), ("get", [identity, "--json"]), ("list", []), ("list", ["--json"])):
        ran = await command(verb, *arguments)
        assert (ran.code, ran.err) == (0, "")
        assert identity in ran.out
        assert "whsec_" not in ran.out
    rotated = json.loads((await command("rotate-secret", identity, "--overlap", "60", "--json")).out)
    assert rotated["secret"].startswith("whsec_")
    assert rotated["secret"] != secret
    assert len(rotated["endpoint"]["secrets"]) == 2


async def test_only_what_is_given_changes(command: Command) -> None:
    identity, _ = await create(command, "https://crm.example.com/hook")
    ran = await command("update", identity, "--url", "https://crm.example.com/new", "--rate-limit", "2.5", "--json")
    found = json.loads(ran.out)
    assert (found["url"], found["rate_limit"], found["events"]) == ("https://crm.example.com/new", 2.5, ["DELETED"])
    found = json.loads((await command("update", identity, "--event", "", "--rate-limit", "0", "--json")).out)
    assert not found.get("events")
    assert not found.get("rate_limit")
    assert found["url"] == "https://crm.example.com/new"


async def test_off_and_on_and_away(command: Command) -> None:
    identity, _ = await create(command, "https://crm.example.com/hook")
    off = fields(await command("disable", identity, "--reason", "moves today"))
    assert (off["state"], off["reason"], off["version"]) == ("disabled", "moves today", "2")
    ran = await command("enable", identity, "--version", "1")
    assert (ran.code, ran.out) == (5, "")
    assert fields(await command("enable", identity, "--version", "2"))["state"] == "enabled"
    assert await command("delete", identity) == Ran(0, "", "")
    ran = await command("get", identity)
    assert (ran.code, ran.out) == (4, "")
    assert f"no endpoint {identity}" in ran.err


async def test_refusals_name_what_is_wrong(command: Command) -> None:
    identity, _ = await create(command, "https://crm.example.com/hook")
    for arguments, code, message in (
        (("create", "--name", "crm", "--url", "https://a.example"), 5, "crm is taken"),
        (("create", "--name", "other", "--url", "http://10.0.0.1/"), 3, "endpoint.url: "),
        (("update", identity), 2, "nothing to change"),
    ):
        ran = await command(*arguments)
        assert (ran.code, ran.out) == (code, ""), arguments
        assert message in ran.err


@pytest.mark.parametrize(
    ("status", "code", "outcome"), [(204, 0, "succeeded"), (503, 1, "failed"), (410, 1, "refused")]
)
async def test_an_example_is_sent(command: Command, status: int, code: int, outcome: str) -> None:
    got: list[tuple[bytes, dict[str, str]]] = []

    async def hook(request: web.Request) -> web.Response:
        got.append((await request.read(), dict(request.headers)))
        return web.Response(status=status)

    app = web.Application()
    app.router.add_post("/hook", hook)
    async with TestServer(app) as server:
        identity, secret = await create(command, str(server.make_url("/hook")))
        ran = await command("test", identity)
    assert (ran.code, ran.out.split()[:2]) == (code, [outcome, str(status)])
    assert len(got) == 1
    Webhook(secret).verify(*got[0])
    # An example disables nothing.
    assert fields(await command("get", identity))["state"] == "enabled"
