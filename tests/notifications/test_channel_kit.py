"""The channel kit, run for every channel of the service and for the example of docs/channels.md."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from notification_service.channels import Addressee, Channel, Draft, Message, Outcome, Writer
from notification_service.channels.email import EmailChannel, Mail, message_id
from notification_service.channels.webhook import WebhookChannel
from notification_service.domain import Result
from notification_service.endpoints import Endpoint
from notification_service.registry import Endpoints
from notification_service.templates import Rendered, RenderError
from tests.harness.bad import BadServer, Gone, Plan, half, until_gone
from tests.harness.bad_http import BadHttp
from tests.harness.bad_http import Trouble as HttpTrouble
from tests.harness.bad_smtp import OF_CONNECTIONS, OF_MAILS, Act, BadSmtp, Stage
from tests.harness.bad_smtp import Trouble as SmtpTrouble
from tests.notifications import channel_kit as kit
from tests.notifications import example_channel
from tests.notifications.channel_kit import CHECKS, Adapter, Kind, of_trouble, repeats_itself
from tests.notifications.conftest import SENDER, TRACE_PARENT
from tests.notifications.example_channel import PagerChannel, PagerWriter
from tests.notifications.test_channels import LOOPBACK, SECRETS

_DOCS = Path(__file__).parents[2] / "docs" / "channels.md"
_TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _id(number: int) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, str(number))


# Mail


def _kind_of_mail(trouble: SmtpTrouble) -> Kind:
    if trouble.act is Act.LEAVE:
        return Kind.ODD
    # Whoever does not greet says nothing about a mail.
    if trouble.stage is Stage.RSET or (trouble.act is Act.NEVER and trouble not in OF_CONNECTIONS):
        return Kind.REFUSED
    if trouble.act in (Act.STALL, Act.DRIP):
        return Kind.SILENT
    return Kind.CUT if trouble.act in (Act.CUT, Act.DROP) else Kind.NOT_NOW


def _mail(_: BadSmtp, number: int) -> Message:
    content = Mail(f"Ada {number}", "Grüezi", "Grüezi\n.dot\n", "<p>Grüezi</p>").encode()
    return Message(f"ada{number}@example.com", message_id(_id(number), SENDER), content, _TIME, TRACE_PARENT)


def _tell_mail(server: BadSmtp, trouble: SmtpTrouble) -> None:
    (server.greetings if trouble in OF_CONNECTIONS else server.mails).tell(trouble)


def _calm_mail(server: BadSmtp) -> None:
    server.greetings.calm()
    server.mails.calm()


def _email(server: BadSmtp, timeout: float) -> Channel:
    return EmailChannel("127.0.0.1", server.port, sender=SENDER, tls="off", timeout=timeout)


_SMTP = (*OF_CONNECTIONS, *OF_MAILS)
EMAIL = Adapter(
    "email",
    lambda: BadSmtp("mail"),
    _email,
    _mail,
    _tell_mail,
    _calm_mail,
    {kind: [one for one in _SMTP if _kind_of_mail(one) is kind] for kind in Kind},
    [one for one in _SMTP if one.accepted and one.act is not Act.LEAVE],
    OF_CONNECTIONS,
)


# Webhooks

_CALLS = {
    Kind.REFUSED: [HttpTrouble.REDIRECT, HttpTrouble.NOT_FOUND, HttpTrouble.GONE, HttpTrouble.TOO_LARGE],
    Kind.NOT_NOW: [HttpTrouble.ERROR],
    Kind.WAIT: [HttpTrouble.BUSY_SECONDS, HttpTrouble.BUSY_DATE],
    Kind.SILENT: [
        HttpTrouble.HANGS, HttpTrouble.DRIPS, HttpTrouble.ACCEPTS_AND_HANGS, HttpTrouble.ACCEPTS_AND_DRIPS,
    ],
    Kind.CUT: [
        HttpTrouble.HALF_HEADER, HttpTrouble.NO_HTTP, HttpTrouble.CLOSES, HttpTrouble.ACCEPTS_AND_CLOSES,
        HttpTrouble.ACCEPTS_AND_CUTS,
    ],
    Kind.ENDLESS: [HttpTrouble.ENDLESS_ERROR],
    Kind.ODD: [
        HttpTrouble.ACCEPTS_WITHOUT_BODY, HttpTrouble.ACCEPTS_AND_BREAKS, HttpTrouble.ACCEPTS_ENDLESSLY,
    ],
}  # fmt: skip


def _webhook(server: BadHttp, timeout: float) -> Channel:
    endpoint = Endpoint.model_validate({"name": "crm", "url": server.url(), "secret": " ".join(SECRETS)})
    return WebhookChannel(Endpoints([endpoint.destination()]), connections=20, timeout=timeout, networks=LOOPBACK)


def _call(server: BadHttp, number: int) -> Message:
    body = json.dumps({"type": "user.created", "number": number, "name": "Ада"}).encode()
    return Message(server.url(), str(_id(number)), body, _TIME, TRACE_PARENT, "a=b")


WEBHOOK = Adapter(
    "webhook",
    lambda: BadHttp("crm"),
    _webhook,
    _call,
    lambda server, trouble: server.calls.tell(trouble),
    lambda server: server.calls.calm(),
    _CALLS,
    [one for one in HttpTrouble if one.name.startswith("ACCEPTS_AND") and one not in _CALLS[Kind.ODD]],
)


# The example


class Line(Enum):
    """What the pager's server does instead of saying OK."""

    REFUSES = b"NO such\0 pager\n"
    ASKS_TO_WAIT = b"LATER 7\n"
    IS_BUSY = b"LATER\n"
    HANGS = b""
    CUTS = b"LATER 70"
    BABBLES = b"what?\n"
    NEVER_ENDS = b"NO " * 60_000
    TAKES_AND_HANGS = b" "
    TAKES_AND_CUTS = b"OK"


class BadPager(BadServer):
    """A server of the example's protocol."""

    lines: Plan[Line]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        page = json.loads(await reader.readline())
        line = self.lines.next()
        received = self._note(page["id"], page["to"], page["text"].encode(), writer)
        if line is None or line.name.startswith("TAKES"):
            await self._keep(received)
        answer = line.value if line else b"OK taken\n"
        if line in (Line.HANGS, Line.TAKES_AND_HANGS):
            await until_gone(reader)
        if line in (Line.CUTS, Line.TAKES_AND_CUTS):
            await half(writer, answer * 2)
        writer.write(answer)
        await writer.drain()
        raise Gone


def _pager_server() -> BadPager:
    made = BadPager("pager")
    made.lines = Plan()
    return made


PAGER = Adapter(
    "pager",
    _pager_server,
    lambda server, _: PagerChannel("127.0.0.1", server.port),
    lambda _, number: Message(f"ada{number}@example.com", str(_id(number)), "Grüezi".encode(), _TIME),
    lambda server, line: server.lines.tell(line),
    lambda server: server.lines.calm(),
    {
        Kind.REFUSED: [Line.REFUSES],
        Kind.NOT_NOW: [Line.IS_BUSY, Line.BABBLES],
        Kind.WAIT: [Line.ASKS_TO_WAIT],
        Kind.SILENT: [Line.HANGS, Line.TAKES_AND_HANGS],
        Kind.CUT: [Line.CUTS, Line.TAKES_AND_CUTS],
        Kind.ENDLESS: [Line.NEVER_ENDS],
    },
    [Line.TAKES_AND_HANGS, Line.TAKES_AND_CUTS],
)

ADAPTERS = (EMAIL, WEBHOOK, PAGER)


def _params(found: Iterator[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*one, id="-".join(_name(part) for part in one)) for one in found]


def _name(part: Any) -> str:
    return part.name if isinstance(part, Adapter | Enum) else getattr(part, "__name__", str(part))


@pytest.mark.parametrize(("adapter", "check"), _params((one, check) for one in ADAPTERS for check in CHECKS))
async def test_a_channel(adapter: Adapter, check: Any) -> None:
    await check(adapter)


@pytest.mark.parametrize(
    ("adapter", "check", "kind", "trouble"), _params((one, *made) for one in ADAPTERS for made in of_trouble(one))
)
async def test_a_channel_and_a_server_in_trouble(adapter: Adapter, check: Any, kind: Kind, trouble: Any) -> None:
    await check(adapter, kind, trouble)


@pytest.mark.parametrize(("adapter", "trouble"), _params((one, lost) for one in ADAPTERS for lost in one.lost))
async def test_a_channel_repeats_itself(adapter: Adapter, trouble: Any) -> None:
    await repeats_itself(adapter, trouble)


def test_every_trouble_of_the_servers_is_tried() -> None:
    for adapter, all_ in ((EMAIL, _SMTP), (WEBHOOK, tuple(HttpTrouble)), (PAGER, tuple(Line))):
        tried = [one for troubles in adapter.troubles.values() for one in troubles]
        assert sorted(map(str, tried)) == sorted(map(str, all_))


# What breaks the rules is found out


class _Raises(PagerChannel):
    async def send(self, message: Message) -> Outcome:
        raise ValueError("no")


class _Leaks(PagerChannel):
    async def send(self, message: Message) -> Outcome:
        self._kept = await asyncio.open_connection(self._host, self._port)
        return await super().send(message)


class _Swallows(PagerChannel):
    async def send(self, message: Message) -> Outcome:
        try:
            return await super().send(message)
        except asyncio.CancelledError:
            return Outcome(Result.FAILED)


class _Changes(PagerChannel):
    async def send(self, message: Message) -> Outcome:
        return await super().send(replace(message, content=uuid.uuid4().hex.encode()))


class _Rambles(PagerChannel):
    async def send(self, message: Message) -> Outcome:
        return replace(await super().send(message), detail="one\ntwo")


class _Believes(PagerChannel):
    async def send(self, message: Message) -> Outcome:
        await super().send(message)
        return Outcome(Result.SUCCEEDED)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (_Raises, kit.serves_many_at_once),
        (_Leaks, kit.closes_twice),
        (_Swallows, kit.can_be_cancelled_anywhere),
        (_Believes, kit.outlives_its_server),
        (_Changes, lambda adapter: repeats_itself(adapter, Line.TAKES_AND_CUTS)),
        (_Rambles, lambda adapter: kit.says_what_the_server_said(adapter, Kind.REFUSED, Line.REFUSES)),
        (_Believes, lambda adapter: kit.says_what_the_server_said(adapter, Kind.REFUSED, Line.REFUSES)),
    ],
)
async def test_a_channel_that_breaks_the_rules_is_found_out(
    broken: type[PagerChannel], check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "_HANGS", 0.5)
    adapter = replace(PAGER, channel=lambda server, _: broken("127.0.0.1", server.port))
    with pytest.raises((AssertionError, ValueError, TimeoutError)):
        await check(adapter)


def test_the_example_stands_in_the_docs() -> None:
    code = Path(example_channel.__file__).read_text(encoding="utf-8")
    assert code.partition("\n\n")[2] in _DOCS.read_text(encoding="utf-8")


def test_the_example_makes_a_page_for_each_address() -> None:
    def say(which: str) -> Rendered:
        if which == "previous":
            raise RenderError("t.txt: no such label")
        return Rendered("Grüezi", "text", "", "", "", "")

    writer: Writer = PagerWriter()
    told = [Addressee(which, "Ada", f"{which}@example.com") for which in ("current", "previous")]
    draft = Draft(_id(1), "account", "CREATED", [*told, told[0], Addressee("current", "Ada", "")], say, dict)
    page, failed = writer.compose(draft)
    assert (page.target, page.content, page.problem) == ("current@example.com", "Grüezi".encode(), "")
    assert (failed.target, failed.content, failed.problem) == ("previous@example.com", b"", "t.txt: no such label")
    assert [page, failed] == list(writer.compose(draft))
