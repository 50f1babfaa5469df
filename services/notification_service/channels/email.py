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
from email.header import Header
from email.utils import format_datetime, formataddr, parseaddr
from functools import lru_cache
from typing import Any

import aiosmtplib
import idna

from notification_service.channels import Draft, Message, Outcome, Says, outcome
from notification_service.domain import EMAIL, Delivery, Result, delivery_id
from notification_service.templates import RenderError

_encode = json.JSONEncoder(ensure_ascii=False).encode
# Of a line of a header, in characters; of an encoded word, in bytes before base64.
_LONGEST_LINE, _LONGEST_WORD = 78, 39
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")
_SERVICE_CLOSING = 421

# A kept connection that was idle for longer is not trusted: servers close theirs without asking.
_IDLE_LIMIT = 30.0
_RESET_TIME = 1.0  # seconds

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
        return _encode(fields).encode()

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
    return f"<{delivery}@{_domain_of(sender)}>"


@lru_cache(maxsize=16)
def _domain_of(sender: str) -> str:
    return _ascii_domain(parseaddr(sender)[1].rpartition("@")[2])


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
    """Text outside ASCII as encoded words, a line of a header each: of whole characters, and so many bytes that a line
    with the name of the header is no longer than RFC 2047 has it.
    """
    words: list[bytes] = [b""]
    for character in text:
        encoded = character.encode()
        if len(words[-1]) + len(encoded) > _LONGEST_WORD:
            words.append(b"")
        words[-1] += encoded
    return "\r\n ".join(f"=?utf-8?b?{binascii.b2a_base64(word, newline=False).decode()}?=" for word in words)


def _header(text: str) -> str:
    if not text.isascii():
        return _encoded(text)
    # Long lines are folded between words.
    short = len(text) <= _LONGEST_LINE - len("Subject: ")
    return text if short else Header(text, header_name="Subject").encode(linesep="\r\n")


def _part(subtype: str, text: str) -> bytes:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").encode()
    head = f'Content-Type: text/{subtype}; charset="utf-8"\r\nMIME-Version: 1.0\r\n'.encode()
    body = binascii.b2a_qp(lines, istext=True).replace(b"\n", b"\r\n")
    return head + b"Content-Transfer-Encoding: quoted-printable\r\n\r\n" + body


def build(message: Message, sender: str, recipient: str) -> bytes:
    """The bytes of a mail, joined by hand: the standard library's classes take ten times as long for the same bytes."""
    mail = Mail.decode(message.content)
    boundary = f"=_{message.idempotency_key.strip('<>').partition('@')[0]}"
    trace = f"Traceparent: {message.trace_parent}\r\n" if message.trace_parent else ""
    head = (
        f"From: {sender}\r\n"
        f"To: {mailbox(mail.name, recipient)}\r\n{_unsubscribe(mail.unsubscribe_url)}"
        f'Content-Type: multipart/alternative;\r\n boundary="{boundary}"\r\n'
        "MIME-Version: 1.0\r\n"
        f"Subject: {_header(_CONTROLS.sub(' ', mail.subject))}\r\n"
        f"Date: {format_datetime(message.create_time)}\r\n"
        f"Message-ID: {message.idempotency_key}\r\n"
        f"Auto-Submitted: auto-generated\r\n{trace}"
    )
    between = f"\r\n--{boundary}\r\n".encode()
    end = f"\r\n--{boundary}--\r\n".encode()
    return b"".join((head.encode(), between, _part("plain", mail.text), between, _part("html", mail.html), end))


def _unsubscribe(url: str) -> str:
    """Header lines; a link is not to be folded."""
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
        _go_on_unless_cancelled()
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
            # The answer is known: what may follow must not cost the attempt its time.
            async with asyncio.timeout(_RESET_TIME):
                await client.rset()
            self._keep(client)
        except (aiosmtplib.SMTPException, OSError):
            client.close()
        except BaseException:
            client.close()
            raise
        # One that is closing says so whatever it is asked; other codes are about this mail.
        outage = error.code == _SERVICE_CLOSING
        return outcome(Result.REFUSED if permanent else Result.FAILED, error.code, error.message, outage=outage)

    async def _connect(self) -> aiosmtplib.SMTP:
        client = aiosmtplib.SMTP(**self._options)
        try:
            await client.connect()
            _go_on_unless_cancelled()
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


def _go_on_unless_cancelled() -> None:
    """`asyncio.wait_for`, which aiosmtplib uses, loses a cancellation that meets an answer; since Python 3.12 it does
    not.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


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
