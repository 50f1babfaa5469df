"""Webhook endpoints by API: over a real gRPC connection, a real Postgres and a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from google.protobuf import duration_pb2, field_mask_pb2
from standardwebhooks import Webhook, WebhookVerificationError

from notification_service import categories, destinations, egress, endpoints, lanes, rules
from notification_service.api.endpoints import EndpointService
from notification_service.breaker import Patience
from notification_service.channels import Message
from notification_service.channels.webhook import WebhookChannel
from notification_service.compose import Composer
from notification_service.dispatcher import Dispatcher, Lane
from notification_service.domain import WEBHOOK, Result
from notification_service.inbox import Inbox
from notification_service.registry import Endpoints
from notification_service.retries import Policy
from notification_service.routes import Target, Targets
from notification_service.store import feed, reads
from notification_service.templates import Templates
from servicekit import callers, guard
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, Events, batch, eventually, write
from tests.notifications.test_api import refusal
from tidings.client import ApiError, WebhookEndpoints
from tidings.notifications.v1 import endpoints_pb2 as pb
from tidings.notifications.v1 import endpoints_pb2_grpc, notifications_pb2

LOOPBACK = (egress.network("127.0.0.0/8"),)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
FILE = f'[[endpoints]]\nname = "crm"\nurl = "http://127.0.0.1:1/crm"\nsecret = "{SECRET}"\n'


@dataclass
class Hooks:
    """An HTTP server that answers as told and keeps what it got."""

    url: str = ""
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    answer: Callable[[], web.Response] = web.Response

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.got.append((request.path, dict(request.headers), await request.read()))
        return self.answer()

    def signed_by(self, *secrets: str) -> list[bool]:
        """Which of the secrets the newest call is signed with."""
        _, headers, body = self.got[-1]
        found = []
        for secret in secrets:
            try:
                Webhook(secret).verify(body, headers)
                found.append(True)
            except WebhookVerificationError:
                found.append(False)
        return found


@dataclass
class Replica:
    """What a process has of it all."""

    endpoints: Endpoints
    channel: WebhookChannel
    client: WebhookEndpoints
    stub: endpoints_pb2_grpc.EndpointServiceAsyncStub
    went: list[int]

    async def send(self, target: str) -> tuple[Result, int, str]:
        """An attempt to deliver."""
        message = Message(target, str(uuid.uuid4()), b'{"type":"user.created"}', datetime.now(UTC))
        outcome = await self.channel.send(message)
        return outcome.result, outcome.code, outcome.detail


@pytest.fixture
async def hooks() -> AsyncIterator[Hooks]:
    made = Hooks()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/hook"))
        yield made


@contextlib.asynccontextmanager
async def replica(pool: Pool, tmp_path: Path) -> AsyncIterator[Replica]:
    of_file = [one.destination() for one in endpoints.load(write(tmp_path / "webhooks.toml", FILE))]
    went: list[int] = []
    known = Endpoints(of_file, pool, lambda: went.append(1))
    channel = WebhookChannel(known, connections=4, timeout=2.0, networks=LOOPBACK)
    server = grpc.aio.server()
    guard.add(
        server,
        callers.anyone,
        endpoints_pb2_grpc.add_EndpointServiceServicer_to_server,
        EndpointService(pool, known, channel, lambda: None, LOOPBACK),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop = asyncio.create_task(known.run(0.05))
    await known.loaded()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        stub: endpoints_pb2_grpc.EndpointServiceAsyncStub = endpoints_pb2_grpc.EndpointServiceStub(opened)
        yield Replica(known, channel, WebhookEndpoints(opened), stub, went)
    await server.stop(1.0)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    await channel.close()


@pytest.fixture
async def here(pool: Pool, tmp_path: Path) -> AsyncIterator[Replica]:
    async with replica(pool, tmp_path) as made:
        yield made


@pytest.fixture
async def there(pool: Pool, tmp_path: Path) -> AsyncIterator[Replica]:
    async with replica(pool, tmp_path) as made:
        yield made


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return refusal(raised.value)


async def test_the_life_of_an_endpoint(here: Replica, hooks: Hooks) -> None:
    given = pb.Endpoint(
        name="a", url=hooks.url, events=["SENT", "DELETED", "CREATED"], categories=["account"], rate_limit=5
    )
    made, secret = await here.client.create(given)
    assert destinations.is_secret(secret)
    assert (made.version, made.state, made.origin) == (1, pb.Endpoint.ENABLED, pb.Endpoint.API)
    assert made.target == f"endpoints/{made.id}"
    assert (list(made.events), made.rate_limit, len(made.secrets)) == (["CREATED", "DELETED", "SENT"], 5, 1)
    assert await here.client.get(made.id) == made
    changed = await here.client.update(
        pb.Endpoint(id=made.id, name="b", description="for b", version=1), ["name", "description"]
    )
    assert (changed.name, changed.description, changed.url, changed.version) == ("b", "for b", hooks.url, 2)
    assert changed.update_time.ToDatetime() > made.update_time.ToDatetime()
    for call in (
        here.stub.UpdateEndpoint(
            pb.UpdateEndpointRequest(
                endpoint=pb.Endpoint(id=made.id, name="c", version=1),
                update_mask=field_mask_pb2.FieldMask(paths=["name"]),
            )
        ),
        here.stub.DeleteEndpoint(pb.DeleteEndpointRequest(id=made.id, version=1)),
        here.stub.RotateEndpointSecret(pb.RotateEndpointSecretRequest(id=made.id, version=1)),
        here.stub.DisableEndpoint(pb.DisableEndpointRequest(id=made.id, version=1)),
    ):
        assert (await refused(call))[:2] == (grpc.StatusCode.ABORTED, "STALE_VERSION")
    off = await here.client.disable(made.id, reason="moving")
    assert (off.state, off.disable_reason, off.HasField("disable_time")) == (pb.Endpoint.DISABLED, "moving", True)
    assert (await here.client.disable(made.id, reason="again")) == off
    on = await here.client.enable(made.id)
    assert (on.state, on.disable_reason, on.HasField("disable_time")) == (pb.Endpoint.ENABLED, "", False)
    await here.client.delete(made.id, version=on.version)
    for unary in (
        here.stub.GetEndpoint(pb.GetEndpointRequest(id=made.id)),
        here.stub.DeleteEndpoint(pb.DeleteEndpointRequest(id=made.id)),
        here.stub.EnableEndpoint(pb.EnableEndpointRequest(id=made.id)),
        here.stub.TestEndpoint(pb.TestEndpointRequest(id=made.id)),
    ):
        assert (await refused(unary))[:2] == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ENDPOINT")


async def test_what_is_refused_is_named(here: Replica, hooks: Hooks) -> None:
    bad = pb.Endpoint(
        name="Ä", url="ftp://x/", description="x" * 501, events=["MOVED"], categories=[""], rate_limit=float("nan")
    )
    request = pb.CreateEndpointRequest(endpoint=bad, secret="whsec_short", request_id="x")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await here.stub.CreateEndpoint(request)
    code, reason, fields = refusal(raised.value)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    names = ("name", "url", "description", "events", "categories", "rate_limit")
    assert fields == [*(f"endpoint.{name}" for name in names), "secret", "request_id"]
    assert "whsec_short" not in str(raised.value)
    await here.client.create(pb.Endpoint(name="a", url=hooks.url))
    made, _ = await here.client.create(pb.Endpoint(name="b", url=hooks.url))
    for taken in ("a", "crm"):
        create = pb.CreateEndpointRequest(endpoint=pb.Endpoint(name=taken, url=hooks.url))
        assert (await refused(here.stub.CreateEndpoint(create)))[:2] == (
            grpc.StatusCode.ALREADY_EXISTS,
            "NAME_TAKEN",
        )
        with pytest.raises(ApiError, match=f"endpoint.name: {taken} is taken"):
            await here.client.update(pb.Endpoint(id=made.id, name=taken), ["name"])
    update = pb.UpdateEndpointRequest(endpoint=pb.Endpoint(id=made.id))
    assert (await refused(here.stub.UpdateEndpoint(update)))[2] == ["update_mask"]
    update.update_mask.paths.append("state")
    assert (await refused(here.stub.UpdateEndpoint(update)))[2] == ["update_mask"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "required"),
        ("http://", "host"),
        ("https://u:p@example.com/", "credentials"),
        ("https://u@example.com/", "credentials"),
        ("https://example.com/#x", "fragment"),
        ("https://example.com/#", "fragment"),
        ("https://example.com/" + "x" * 2048, "at most"),
        ("https://example.com/ x", "blanks"),
        ("http://10.0.0.1/", "not a public address"),
        ("http://[::ffff:169.254.169.254]/", "not a public address"),
        ("http://0x0a.1/", "not a public address"),
        ("http://2852039166/", "not a public address"),
        ("http://127.0.0.1/", None),
        ("https://example.com:8443/x?y=z", None),
        ("https://8.8.8.8/", None),
    ],
)
def test_where_webhooks_may_go(url: str, says: str | None) -> None:
    wrong = destinations.wrong_with_url(url, LOOPBACK)
    assert wrong is None if says is None else says in (wrong or "")


async def test_a_retried_creation_gets_the_first_answer(here: Replica, hooks: Hooks) -> None:
    request = pb.CreateEndpointRequest(endpoint=pb.Endpoint(name="a", url=hooks.url), request_id=str(uuid.uuid4()))
    first, *others = await asyncio.gather(*(here.stub.CreateEndpoint(request) for _ in range(4)))
    assert all(one == first for one in others)
    assert first.secret
    request.endpoint.description = "another"
    assert (await refused(here.stub.CreateEndpoint(request)))[1] == "REQUEST_ID_REUSED"


async def test_pages_hold_all_once_and_no_secret(here: Replica, hooks: Hooks) -> None:
    made = [(await here.client.create(pb.Endpoint(name=f"e{number}", url=hooks.url)))[1] for number in range(5)]
    found = [one async for one in here.client.list(page_size=2)]
    assert [one.name for one in found] == ["e4", "e3", "e2", "e1", "e0", "crm"]
    assert (found[-1].origin, found[-1].target) == (pb.Endpoint.FILE, "http://127.0.0.1:1/crm")
    assert not any(secret in str(found) or secret in repr(list(here.endpoints)) for secret in (*made, SECRET))
    await here.client.disable(found[1].id)
    assert [one.name async for one in here.client.list(state=pb.Endpoint.DISABLED)] == ["e3"]
    page = await here.stub.ListEndpoints(pb.ListEndpointsRequest(page_size=2))
    other = pb.ListEndpointsRequest(page_token=page.next_page_token)
    other.filter.state = pb.Endpoint.ENABLED
    assert (await refused(here.stub.ListEndpoints(other)))[1] == "TOKEN_MISMATCH"


async def test_what_the_file_has_is_read_only(here: Replica) -> None:
    (crm,) = [one async for one in here.client.list()]
    assert await here.client.get(crm.id) == crm
    update = pb.UpdateEndpointRequest(
        endpoint=pb.Endpoint(id=crm.id, description="x"), update_mask=field_mask_pb2.FieldMask(paths=["description"])
    )
    for call in (
        here.stub.UpdateEndpoint(update),
        here.stub.DeleteEndpoint(pb.DeleteEndpointRequest(id=crm.id)),
        here.stub.RotateEndpointSecret(pb.RotateEndpointSecretRequest(id=crm.id)),
        here.stub.DisableEndpoint(pb.DisableEndpointRequest(id=crm.id)),
        here.stub.EnableEndpoint(pb.EnableEndpointRequest(id=crm.id)),
    ):
        assert (await refused(call))[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "ENDPOINT_OF_FILE")


async def test_secrets_overlap_and_expire(here: Replica, there: Replica, hooks: Hooks, connection: Connection) -> None:
    made, first = await here.client.create(pb.Endpoint(name="a", url=hooks.url), secret=SECRET)
    assert first == SECRET
    rotated, second = await here.client.rotate_secret(made.id, secret=OTHER_SECRET)
    assert second == OTHER_SECRET
    old, new = rotated.secrets
    assert not new.HasField("expire_time")
    assert old.expire_time.ToDatetime() - new.create_time.ToDatetime() == timedelta(hours=24)
    assert (await here.send(made.target))[0] is Result.SUCCEEDED
    assert hooks.signed_by(first, second) == [True, True]
    # Before, the other replica may know the first alone.
    await eventually(lambda: [len(one.secrets) for one in there.endpoints] == [1, 2])
    # A day passes.
    await connection.execute("UPDATE endpoint_secrets SET expire_time = now() WHERE expire_time IS NOT NULL")

    async def is_removed() -> bool:
        row = await (await connection.execute("SELECT count(*) FROM endpoint_secrets")).fetchone()
        return row == (1,)

    await eventually(is_removed)
    for replica in (here, there):
        await eventually(lambda: [len(x.secrets) for x in replica.endpoints if x.name == "a"] == [1])  # noqa: B023
        await replica.send(made.target)
        assert hooks.signed_by(first, second) == [False, True]
    _, third = await here.client.rotate_secret(made.id, overlap=0)
    await here.send(made.target)
    assert hooks.signed_by(second, third) == [False, True]
    for _ in range(4):
        await here.client.rotate_secret(made.id, overlap=60)
    with pytest.raises(ApiError) as raised:
        await here.client.rotate_secret(made.id, overlap=60)
    assert raised.value.reason == "TOO_MANY_SECRETS"
    request = pb.RotateEndpointSecretRequest(id=made.id, overlap=duration_pb2.Duration(seconds=30 * 86400 + 1))
    assert (await refused(here.stub.RotateEndpointSecret(request)))[2] == ["overlap"]


def test_a_secret_stops_signing_though_nobody_removes_it() -> None:
    now = datetime.now(UTC)
    secrets = (destinations.Secret(SECRET, now, now), destinations.Secret(OTHER_SECRET, now))
    endpoint = destinations.Destination(uuid.uuid4(), "a", "http://a/", "a", secrets)
    assert len(endpoint.signers(now - timedelta(seconds=1))) == 2
    (left,) = endpoint.signers(now)
    assert left.sign("x", now, "{}") == Webhook(OTHER_SECRET).sign("x", now, "{}")


async def test_gone_disables_at_once(
    here: Replica, there: Replica, hooks: Hooks, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = await here.client.create(pb.Endpoint(name="a", url=hooks.url))
    hooks.answer = lambda: web.Response(status=410, text="ada left")
    assert await here.send(made.target) == (Result.REFUSED, 410, "ada left")
    found = await here.client.get(made.id)
    assert (found.state, found.disable_reason) == (pb.Endpoint.DISABLED, "answered 410 Gone: ada left")
    assert found.HasField("disable_time")
    assert here.endpoints.paused_targets() == [made.target]
    assert here.went == [1]
    assert "ada left" not in "".join(capsys.readouterr())
    await eventually(lambda: there.endpoints.paused_targets() == [made.target])
    calls = len(hooks.got)
    assert (await there.send(made.target))[::2] == (Result.FAILED, "the endpoint is disabled; it was not called")
    assert len(hooks.got) == calls
    hooks.answer = web.Response
    await here.client.enable(made.id)
    assert (await here.send(made.target))[0] is Result.SUCCEEDED
    # One whose URL is another by now is not meant.
    called = next(one for one in here.endpoints if one.name == "a")
    await here.client.update(pb.Endpoint(id=made.id, url=hooks.url + "/new"), ["url"])
    await here.endpoints.gone(called, "")
    assert (await here.client.get(made.id)).state == pb.Endpoint.ENABLED
    assert (await here.send(made.target))[0] is Result.SUCCEEDED
    assert hooks.got[-1][0] == "/hook/new"


async def test_another_replica_knows_what_it_is_asked_for(pool: Pool, here: Replica, hooks: Hooks) -> None:
    idle = Endpoints((), pool)
    made, _ = await here.client.create(pb.Endpoint(name="a", url=hooks.url))
    found = await idle.find(made.target)
    assert found is not None
    assert found.url == hooks.url
    assert await idle.find(destinations.target_of(uuid.uuid4())) is None
    await here.client.delete(made.id)
    assert made.target not in [one.target async for one in here.client.list()]
    assert await here.send(made.target) == (Result.REFUSED, 0, "this endpoint is no longer configured")


async def test_a_test_calls_and_stores_nothing(here: Replica, hooks: Hooks, connection: Connection) -> None:
    made, secret = await here.client.create(pb.Endpoint(name="a", url=hooks.url))
    hooks.answer = lambda: web.Response(status=410, text="gone")
    answer = await here.client.test(made.id)
    assert (answer.outcome, answer.code, answer.detail) == (pb.TestEndpointResponse.REFUSED, 410, "gone")
    assert answer.duration.ToNanoseconds() > 0
    assert (await here.client.get(made.id)).state == pb.Endpoint.ENABLED
    hooks.answer = lambda: web.Response(text="hello")
    await here.client.disable(made.id)
    answer = await here.client.test(made.id)
    assert (answer.outcome, answer.code, answer.detail) == (pb.TestEndpointResponse.SUCCEEDED, 200, "hello")
    assert hooks.signed_by(secret) == [True]
    assert hooks.got[-1][1]["webhook-id"] == answer.webhook_id
    assert json.loads(hooks.got[-1][2])["type"] == "endpoint.test"
    row = await (await connection.execute("SELECT count(*) FROM deliveries")).fetchone()
    assert row == (0,)


async def test_deliveries_from_an_event_to_the_call(
    here: Replica, hooks: Hooks, pool: Pool, connection: Connection, events: Events
) -> None:
    everything, _ = await here.client.create(pb.Endpoint(name="all", url=hooks.url))
    await here.client.create(pb.Endpoint(name="deletions", url=hooks.url, events=["DELETED"]))
    off, _ = await here.client.create(pb.Endpoint(name="off", url=hooks.url))
    await here.client.disable(off.id)
    inbox = Inbox(Composer(rules.load(None), Templates(), lanes.writers(SENDER, here.endpoints)), lambda: None)
    await inbox.store(connection, await feed.read_cursor(connection), batch(events.created("ada")))

    async def states() -> dict[str, tuple[int, str]]:
        found = await reads.list_deliveries(connection, {"channel": WEBHOOK}, 1 << 62, 100)
        return {
            one.delivery.target: (one.delivery.state, *(attempt.detail for attempt in one.delivery.attempts[-1:]))  # type: ignore[misc]
            for one in found
        }

    assert set(await states()) == {everything.target, "http://127.0.0.1:1/crm"}
    await here.client.update(pb.Endpoint(id=everything.id, url=hooks.url + "/moved"), ["url"])

    def enabled() -> dict[str, Target]:
        return {one.target: Target(one.name, one.rate_limit) for one in here.endpoints}

    targets = Targets(here.channel, enabled, here.endpoints.paused_targets, 4, Patience())
    lane = Lane(targets, Policy(3, 300.0, 1.0, 300.0, timeout=2.0), 4)
    dispatcher = Dispatcher(pool, {WEBHOOK: lane}, categories.load(None), lease=10.0, poll_interval=0.05)
    loops = [asyncio.create_task(one) for one in (dispatcher.run_lane(WEBHOOK), dispatcher.record())]
    delivered = notifications_pb2.Delivery.DELIVERED

    async def is_in(target: str, state: int) -> bool:
        return (await states())[target][0] == state

    await eventually(lambda: is_in(everything.target, delivered))
    assert hooks.got[-1][0] == "/hook/moved"
    # What waits for its next attempt ends when its endpoint is deleted.
    hooks.answer = lambda: web.Response(status=503, headers={"Retry-After": "3600"})
    cursor = await feed.read_cursor(connection)
    after = [events.deleted(events.user("bob"))]
    await inbox.store(connection, cursor, batch(*after))
    deletions = next(one for one in here.endpoints if one.name == "deletions").target

    async def has_failed() -> bool:
        row = await (
            await connection.execute(
                "SELECT count(*) FROM deliveries"
                " WHERE target = %s AND next_attempt_time > now() AND lease_until IS NULL",
                [deletions],
            )
        ).fetchone()
        return row == (1,)

    await eventually(has_failed)
    await here.client.delete(str(destinations.id_in(deletions)))
    await eventually(lambda: is_in(deletions, notifications_pb2.Delivery.CANCELLED))
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
