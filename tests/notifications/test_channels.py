"""The channels against a real mail server and a real HTTP server."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from email.utils import format_datetime, parseaddr

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from standardwebhooks import Webhook

from notification_service import egress
from notification_service.channels import Message
from notification_service.channels.email import EmailChannel, Mail, message_id
from notification_service.channels.webhook import WebhookChannel, judge
from notification_service.domain import Result
from notification_service.endpoints import Endpoint
from notification_service.registry import Endpoints
from tests.notifications.conftest import SENDER, TRACE_PARENT, MailServer

LOOPBACK = (egress.network("127.0.0.0/8"),)
SECRETS = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")


def mail_to(target: str, *, name: str = "Ada", subject: str = "Hello", sender: str = SENDER) -> Message:
    delivery = uuid.uuid4()
    return Message(
        target=target,
        idempotency_key=message_id(delivery, sender),
        content=Mail(name, subject, f"Grüezi {name}\n.dot\n", f"<p>Grüezi {name}</p>").encode(),
        create_time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        trace_parent=TRACE_PARENT,
    )


def email_channel(port: int, sender: str = SENDER) -> EmailChannel:
    return EmailChannel("127.0.0.1", port, sender=sender, tls="off", timeout=2.0)


async def test_a_mail_says_what_it_should(mail: MailServer) -> None:
    channel = email_channel(mail.port)
    message = mail_to(
        "ada@example.com", name='Ада "the, Countess"\r\nBcc: x@y', subject="Привет, 李小龍 and " + "long " * 30
    )
    for _ in range(2):
        assert (await channel.send(message)).result is Result.SUCCEEDED
    await channel.close()
    first, second = mail.received
    assert first.raw == second.raw
    assert (first.sender, first.recipient) == ("no-reply@tidings.localhost", "ada@example.com")
    received = first.message
    assert received["Subject"].rstrip() == ("Привет, 李小龍 and " + "long " * 30).rstrip()
    (recipient,) = received["To"].addresses
    assert recipient.display_name == 'Ада "the, Countess" Bcc: x@y'
    assert recipient.addr_spec == "ada@example.com"
    assert received["From"].addresses[0].display_name == "Tidings"
    assert received["Message-ID"] == message.idempotency_key
    assert received["Date"].datetime == message.create_time
    assert received["Auto-Submitted"] == "auto-generated"
    assert received["Traceparent"] == TRACE_PARENT
    assert received["Bcc"] is None
    assert [part.get_content_type() for part in received.walk()] == ["multipart/alternative", "text/plain", "text/html"]
    text, html = received.get_body(("plain",)), received.get_body(("html",))
    assert text is not None
    assert html is not None
    assert "\n.dot\n" in text.get_content().replace("\r\n", "\n")
    assert "<p>Grüezi Ада" in html.get_content()
    assert all(len(line) <= 998 for line in first.raw.split(b"\r\n"))


async def test_long_names_are_folded(mail: MailServer) -> None:
    channel = email_channel(mail.port)
    for name in ("李小龍" * 85, "x" * 256, "Zoë O'Neil, Jr. " * 16):
        assert (await channel.send(mail_to("ada@example.com", name=name))).result is Result.SUCCEEDED
        # Read by the older parser: the newer one leaves blanks between the encoded words of a name.
        recipient = message_from_bytes(mail.received[-1].raw, policy=policy.compat32)["To"]
        shown, address = parseaddr(recipient)
        assert (str(make_header(decode_header(shown))), address) == (name.strip(), "ada@example.com")
        assert max(len(line) for line in mail.received[-1].raw.split(b"\r\n")) < 300
    await channel.close()


async def test_connections_are_used_again(mail: MailServer) -> None:
    channel = email_channel(mail.port)
    for _ in range(5):
        assert (await channel.send(mail_to("ada@example.com"))).code == 250
    await asyncio.gather(*(channel.send(mail_to("ada@example.com")) for _ in range(3)))
    assert len(mail.received) == 8
    assert len(mail.sessions) == 3
    await channel.close()


async def test_a_server_that_has_enough_of_a_connection_gets_another(mail: MailServer) -> None:
    mail.most_per_session = 2
    channel = email_channel(mail.port)
    outcomes = [await channel.send(mail_to("ada@example.com")) for _ in range(5)]
    assert [outcome.result for outcome in outcomes] == [Result.SUCCEEDED] * 5
    assert len(mail.sessions) >= 3
    await channel.close()


async def test_refusals_and_what_may_be_tried_again(mail: MailServer) -> None:
    mail.answers = {
        "gone@example.com": ["550 5.1.1 no such user"],
        "grey@example.com": ["451 4.7.1 come back later"],
        "DATA": ["554 5.7.1 spam", "452 4.3.1 full"],
    }
    channel = email_channel(mail.port)
    outcomes = [
        await channel.send(mail_to(target))
        for target in ("gone@example.com", "grey@example.com", "a@example.com", "b@example.com", "c@example.com")
    ]
    assert [(one.result, one.code) for one in outcomes] == [
        (Result.REFUSED, 550),
        (Result.FAILED, 451),
        (Result.REFUSED, 554),
        (Result.FAILED, 452),
        (Result.SUCCEEDED, 250),
    ]
    assert "no such user" in outcomes[0].detail
    assert [one.recipient for one in mail.received] == ["c@example.com"]
    assert len(mail.sessions) == 1
    await channel.close()


async def test_no_server_is_worth_another_attempt() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcome = await email_channel(port).send(mail_to("ada@example.com"))
    assert outcome.result is Result.FAILED
    assert outcome.detail.startswith("cannot connect: ")


async def test_internationalized_addresses(mail: MailServer, old_mail: MailServer) -> None:
    new, old = email_channel(mail.port), email_channel(old_mail.port)
    assert (await new.send(mail_to("用户@例え.jp", name="用户"))).result is Result.SUCCEEDED
    assert "用户@例え.jp" in mail.received[0].raw.decode()
    assert (await old.send(mail_to("user@例え.jp", name="用户"))).result is Result.SUCCEEDED
    assert old_mail.received[0].recipient == "user@xn--r8jz45g.jp"
    assert old_mail.received[0].message["To"].addresses[0].display_name == "用户"
    refused = await old.send(mail_to("用户@例え.jp"))
    assert refused.result is Result.REFUSED
    assert "no addresses outside ASCII" in refused.detail
    await new.close()
    await old.close()


async def test_a_sender_outside_ascii(old_mail: MailServer) -> None:
    sender = "Müller <post@müller.example>"
    channel = email_channel(old_mail.port, sender)
    message = mail_to("ada@example.com", sender=sender)
    assert message.idempotency_key.endswith("@xn--mller-kva.example>")
    assert (await channel.send(message)).result is Result.SUCCEEDED
    assert old_mail.received[0].sender == "post@xn--mller-kva.example"
    assert old_mail.received[0].message["From"].addresses[0].display_name == "Müller"
    await channel.close()


class Hooks:
    """An HTTP server that answers as told and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer: Callable[[], web.Response] = web.Response
        self.delay = 0.0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.got.append((dict(request.headers), await request.read()))
        await asyncio.sleep(self.delay)
        return self.answer()


@pytest.fixture
async def hooks() -> Hooks:
    return Hooks()


@pytest.fixture
async def hook_url(hooks: Hooks) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hooks.handle)
    async with TestServer(app) as server:
        yield str(server.make_url("/hook"))


@pytest.fixture
async def webhooks(hook_url: str) -> AsyncIterator[WebhookChannel]:
    endpoint = Endpoint.model_validate({"name": "crm", "url": hook_url, "secret": " ".join(SECRETS)})
    channel = WebhookChannel(Endpoints([endpoint.destination()]), connections=4, timeout=0.5, networks=LOOPBACK)
    yield channel
    await channel.close()


def call(url: str) -> Message:
    return Message(
        url, str(uuid.uuid4()), '{"type":"user.created","name":"Ада"}'.encode(), datetime.now(UTC), TRACE_PARENT, "a=b"
    )


async def test_a_call_is_signed_with_every_secret(hooks: Hooks, hook_url: str, webhooks: WebhookChannel) -> None:
    message = call(hook_url)
    for _ in range(2):
        assert (await webhooks.send(message)).result is Result.SUCCEEDED
    assert len(hooks.got) == 2
    for headers, body in hooks.got:
        for secret in SECRETS:
            assert Webhook(secret).verify(body, headers) == {"type": "user.created", "name": "Ада"}
        assert headers["webhook-id"] == message.idempotency_key
        assert (headers["traceparent"], headers["tracestate"]) == (TRACE_PARENT, "a=b")
        assert headers["Content-Type"] == "application/json"


async def test_no_redirect_is_followed(hooks: Hooks, hook_url: str, webhooks: WebhookChannel) -> None:
    hooks.answer = lambda: web.Response(status=307, headers={"Location": hook_url + "/elsewhere"})
    outcome = await webhooks.send(call(hook_url))
    assert (outcome.result, outcome.code) == (Result.REFUSED, 307)
    assert len(hooks.got) == 1


async def test_an_answer_is_bounded_in_time_and_size(hooks: Hooks, hook_url: str, webhooks: WebhookChannel) -> None:
    hooks.answer = lambda: web.Response(status=500, body=b"x" * 10_000_000)
    outcome = await webhooks.send(call(hook_url))
    assert outcome.result is Result.FAILED
    assert 0 < len(outcome.detail) <= 512
    hooks.answer, hooks.delay = web.Response, 2.0
    began = asyncio.get_running_loop().time()
    outcome = await webhooks.send(call(hook_url))
    assert (outcome.result, outcome.detail) == (Result.FAILED, "no answer in time")
    assert asyncio.get_running_loop().time() - began < 1.5


async def test_an_endpoint_that_was_taken_out_is_refused(webhooks: WebhookChannel) -> None:
    outcome = await webhooks.send(call("http://127.0.0.1:1/other"))
    assert outcome.result is Result.REFUSED


@pytest.mark.parametrize(
    ("status", "result"),
    [
        *((status, "SUCCEEDED") for status in (200, 202, 204)),
        *((status, "REFUSED") for status in (302, 400, 404, 410)),
        *((status, "FAILED") for status in (408, 425, 429, 500, 503)),
    ],
)
def test_what_a_status_means(status: int, result: str) -> None:
    assert judge(status, "", None, datetime.now(UTC)).result is Result[result]


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    assert judge(429, "", "120", now).retry_after == 120
    assert judge(503, "", format_datetime(now + timedelta(minutes=5), usegmt=True), now).retry_after == 300
    assert judge(503, "", format_datetime(now - timedelta(minutes=5), usegmt=True), now).retry_after == 0
    assert judge(503, "", "soon", now).retry_after is None
    assert replace(judge(503, "", None, now)).retry_after is None
