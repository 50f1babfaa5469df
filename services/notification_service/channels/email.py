"""Mail over SMTP: multipart of text and HTML, on connections that are kept and used again.

The bytes of a mail are the same at every attempt: Message-ID, Date and the boundary come from the delivery, not from
the moment. Only the trace context is the attempt's own. A refusal of the sender, the recipient or the content with a
5xx is for good; what goes wrong before that (no connection, no login) says nothing about the mail and is worth
another attempt.

Where the notification has a link to unsubscribe by, the mail has it in the headers that mail programs look at (RFC
2369, RFC 8058). It was made with the notification and is part of the content.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email import policy
from email.header import Header
from email.mime.multipart import MIMEMultipart
from email.mime.nonmultipart import MIMENonMultipart
from email.utils import format_datetime, formataddr, parseaddr
from typing import Any

import aiosmtplib
import idna

from notification_service.channels import Draft, Message, Outcome, Says, outcome
from notification_service.domain import EMAIL, Delivery, Result, delivery_id
from notification_service.templates import RenderError

_POLICY = policy.compat32.clone(linesep="\r\n")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")
_SERVICE_CLOSING = 421

# A kept connection that was idle for longer is not trusted: servers close theirs without asking.
_IDLE_LIMIT = 30.0

_TLS: dict[str, dict[str, Any]] = {
    "auto": {"use_tls": False, "start_tls": None},
    "off": {"use_tls": False, "start_tls": False},
    "starttls": {"use_tls": False, "start_tls": True},
    "tls": {"use_tls": True},
}


@dataclass(frozen=True, slots=True)
class Mail:
    """What a mail says, as stored with its delivery."""

    name: str
    subject: str
    text: str
    html: str
    # Empty if the mail has none.
    unsubscribe_url: str = ""

    def encode(self) -> bytes:
        """The content of a delivery."""
        fields = {"name": self.name, "subject": self.subject, "text": self.text, "html": self.html}
        if self.unsubscribe_url:
            fields["unsubscribe_url"] = self.unsubscribe_url
        return json.dumps(fields, ensure_ascii=False).encode()

    @classmethod
    def decode(cls, content: bytes) -> Mail:
        """Reads the content of a delivery; what a later release has put in besides is left out."""
        fields = json.loads(content)
        return cls(**{name: fields[name] for name in cls.__slots__ if name in fields})


@dataclass(frozen=True, slots=True)
class EmailWriter:
    """Makes a mail to each address that a rule names; `sender` is a mailbox."""

    sender: str

    @property
    def says(self) -> Says:
        """Text and HTML."""
        return Says.HTML

    def compose(self, draft: Draft) -> Iterator[Delivery]:
        """See Writer."""
        told: set[str] = set()
        for one in draft.addressees:
            if not one.email or one.email.casefold() in told:
                continue
            told.add(one.email.casefold())
            identity = delivery_id(draft.id, EMAIL, one.email)
            key = message_id(identity, self.sender)
            try:
                said = draft.say(one.which)
            except RenderError as error:
                yield Delivery(identity, EMAIL, one.email, key, problem=str(error))
                continue
            if said.html_problem:
                yield Delivery(identity, EMAIL, one.email, key, problem=said.html_problem)
                continue
            content = Mail(one.name, said.subject, said.text, said.html, one.unsubscribe_url).encode()
            yield Delivery(identity, EMAIL, one.email, key, content)


def message_id(delivery: object, sender: str) -> str:
    """The Message-ID of a delivery: the same for every attempt."""
    domain = parseaddr(sender)[1].rpartition("@")[2]
    return f"<{delivery}@{_ascii_domain(domain)}>"


def _ascii_domain(domain: str) -> str:
    if domain.isascii():
        return domain
    return idna.encode(domain, uts46=True).decode()


def mailbox(name: str, address: str) -> str:
    """A header's mailbox; the address may be outside ASCII, the name is encoded if it is."""
    name = _CONTROLS.sub(" ", name).strip()
    if not name:
        return address
    if name.isascii():
        return formataddr((name, "")).removesuffix(" <>") + f" <{address}>"
    return f"{_encoded(name)} <{address}>"


def _encoded(text: str) -> str:
    """Text outside ASCII as encoded words, a line of a header each."""
    return Header(text, "utf-8", maxlinelen=70).encode(linesep="\r\n")


def _header(text: str) -> str:
    return text if text.isascii() else Header(text, "utf-8", header_name="Subject").encode()


def _part(subtype: str, text: str) -> MIMENonMultipart:
    part = MIMENonMultipart("text", subtype, charset="utf-8")
    part["Content-Transfer-Encoding"] = "quoted-printable"
    part.set_payload(binascii.b2a_qp(text.encode(), istext=True).decode("ascii"))
    return part


def build(message: Message, sender: str, recipient: str) -> bytes:
    """The bytes of a mail. The legacy MIME classes are used because the new ones take six times as long."""
    mail = Mail.decode(message.content)
    root = MIMEMultipart("alternative", boundary=f"=_{message.idempotency_key.strip('<>').partition('@')[0]}")
    root["Subject"] = _header(_CONTROLS.sub(" ", mail.subject))
    root["Date"] = format_datetime(message.create_time)
    root["Message-ID"] = message.idempotency_key
    root["Auto-Submitted"] = "auto-generated"
    if message.trace_parent:
        root["Traceparent"] = message.trace_parent
    root.attach(_part("plain", mail.text))
    root.attach(_part("html", mail.html))
    # Set apart from the generator, which cannot write an address outside ASCII.
    people = f"From: {sender}\r\nTo: {mailbox(mail.name, recipient)}\r\n"
    return (people + _unsubscribe(mail.unsubscribe_url)).encode() + root.as_bytes(policy=_POLICY)


def _unsubscribe(url: str) -> str:
    """Header lines, set apart as well: a link is not to be folded."""
    if not url:
        return ""
    return f"List-Unsubscribe: <{url}>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"


class _UnreachableAddressError(Exception):
    """The server takes no addresses outside ASCII, and this one has no ASCII form."""


class EmailChannel:
    """Sends mail through one server."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        sender: str,
        tls: str = "auto",
        username: str = "",
        password: str = "",
        timeout: float,
    ) -> None:
        self._sender_name, self._sender = parseaddr(sender)
        self._options: dict[str, Any] = {
            "hostname": host,
            "port": port,
            "timeout": timeout,
            "local_hostname": re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost",
            **_TLS[tls],
        }
        if username:
            self._options |= {"username": username, "password": password}
        self._idle: list[tuple[aiosmtplib.SMTP, float]] = []

    async def send(self, message: Message) -> Outcome:
        """Makes one attempt."""
        try:
            client, kept = self._kept() or (await self._connect(), False)
        except (aiosmtplib.SMTPException, OSError) as error:
            return outcome(Result.FAILED, getattr(error, "code", 0), f"cannot connect: {_reason(error)}", outage=True)
        try:
            return await self._transact(client, kept, message)
        except (aiosmtplib.SMTPSenderRefused, aiosmtplib.SMTPRecipientRefused, aiosmtplib.SMTPDataError) as error:
            return await self._refused(client, error)
        except _UnreachableAddressError as error:
            self._keep(client)
            return outcome(Result.REFUSED, 0, str(error))
        except (aiosmtplib.SMTPException, OSError) as error:
            client.close()
            return outcome(Result.FAILED, getattr(error, "code", 0), _reason(error), outage=True)
        except BaseException:
            client.close()
            raise

    async def _transact(self, client: aiosmtplib.SMTP, kept: bool, message: Message) -> Outcome:
        try:
            sender, recipient = await self._envelope(client, message.target)
        except (aiosmtplib.SMTPServerDisconnected, aiosmtplib.SMTPSenderRefused) as error:
            # The server had enough of a kept connection; nothing of this mail was sent on it.
            if not kept or getattr(error, "code", _SERVICE_CLOSING) != _SERVICE_CLOSING:
                raise
            client.close()
            await client.connect()
            sender, recipient = await self._envelope(client, message.target)
        response = await client.data(build(message, mailbox(self._sender_name, sender), recipient))
        self._keep(client)
        return outcome(Result.SUCCEEDED, response.code, response.message)

    async def _envelope(self, client: aiosmtplib.SMTP, target: str) -> tuple[str, str]:
        """MAIL and RCPT; returns sender and recipient as this server takes them."""
        sender, options, encoding = self._sender, [], "ascii"
        if not (sender.isascii() and target.isascii()):
            if client.supports_extension("smtputf8"):
                options, encoding = ["SMTPUTF8", "BODY=8BITMIME"], "utf-8"
            else:
                sender, target = _ascii_address(sender), _ascii_address(target)
        await client.mail(sender, options=options, encoding=encoding)
        await client.rcpt(target, encoding=encoding)
        return sender, target

    async def _refused(self, client: aiosmtplib.SMTP, error: aiosmtplib.SMTPResponseException) -> Outcome:
        permanent = 500 <= error.code < 600
        try:
            await client.rset()
            self._keep(client)
        except (aiosmtplib.SMTPException, OSError):
            client.close()
        # One that is closing says so whatever it is asked; other codes are about this mail.
        outage = error.code == _SERVICE_CLOSING
        return outcome(Result.REFUSED if permanent else Result.FAILED, error.code, error.message, outage=outage)

    async def _connect(self) -> aiosmtplib.SMTP:
        client = aiosmtplib.SMTP(**self._options)
        try:
            await client.connect()
            if client.is_ehlo_or_helo_needed:
                await client.ehlo()
        except BaseException:
            client.close()
            raise
        return client

    def _kept(self) -> tuple[aiosmtplib.SMTP, bool] | None:
        while self._idle:
            # The one used last: those that are not needed grow old and are let go.
            client, since = self._idle.pop()
            if client.is_connected and time.monotonic() - since < _IDLE_LIMIT:
                return client, True
            client.close()
        return None

    def _keep(self, client: aiosmtplib.SMTP) -> None:
        if client.is_connected:
            self._idle.append((client, time.monotonic()))

    async def close(self) -> None:
        """Says goodbye on every kept connection."""
        clients, self._idle = [client for client, _ in self._idle], []

        async def quit_(client: aiosmtplib.SMTP) -> None:
            with contextlib.suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await client.quit()
            client.close()

        await asyncio.gather(*(quit_(client) for client in clients))


def _ascii_address(address: str) -> str:
    local, _, domain = address.rpartition("@")
    try:
        if local.isascii():
            return f"{local}@{_ascii_domain(domain)}"
    except idna.IDNAError:
        pass
    raise _UnreachableAddressError(f"the mail server takes no addresses outside ASCII: {address}")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "message", "") or error) or type(error).__name__
