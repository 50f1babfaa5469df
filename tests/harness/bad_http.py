"""An HTTP server that misbehaves as its plan says. It keeps what it accepts by its webhook-id; the target is the path.

async with BadHttp("crm") as server:
    server.calls.tell(Trouble.ACCEPTS_AND_CLOSES)
    ...  # POST to http://127.0.0.1:{server.port}/hook
    assert server.accepted[0].key == "the-webhook-id"
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from enum import Enum

from tests.harness.bad import BadServer, Gate, Gone, Moment, Plan, Received, drip, half, peer_of, until_gone

_ENDLESS = 1 << 30


class Trouble(Enum):
    """What happens to a call."""

    REDIRECT = "redirects"
    NOT_FOUND = "answers 404"
    GONE = "answers 410"
    TOO_LARGE = "answers 413 before it has read the body"
    BUSY_SECONDS = "answers 429 with Retry-After in seconds"
    BUSY_DATE = "answers 429 with Retry-After as a date"
    ERROR = "answers 500"
    ENDLESS_ERROR = "answers 500 with a body without end"
    HALF_HEADER = "sends half a header and closes"
    NO_HTTP = "answers what is no HTTP"
    CLOSES = "closes without an answer"
    HANGS = "never answers"
    DRIPS = "sends a byte of its answer a second"
    ACCEPTS_AND_CLOSES = "accepts, then closes without an answer"
    ACCEPTS_AND_HANGS = "accepts, then never answers"
    ACCEPTS_AND_CUTS = "accepts, then sends half a header and closes"
    ACCEPTS_AND_DRIPS = "accepts, then sends a byte of its answer a second"
    ACCEPTS_WITHOUT_BODY = "answers 200 and never sends the body that it has announced"
    ACCEPTS_AND_BREAKS = "answers 200 and closes in the middle of the body"
    ACCEPTS_ENDLESSLY = "answers 200 with a body without end"

    def __str__(self) -> str:
        return f"HTTP: {self.value}"


# The receiver has taken the call for its own, whatever it answers.
_ACCEPTING = frozenset(one for one in Trouble if one.name.startswith("ACCEPTS"))
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def _head(status: str, *headers: str, length: int = 0) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def _busy(retry_after: str) -> bytes:
    return _head("429 Too Many Requests", f"Retry-After: {retry_after}")


class BadHttp(BadServer):
    """Asked to wait, it says `wait` seconds."""

    def __init__(
        self, name: str, calls: Plan[Trouble] | None = None, gate: Gate | None = None, *, wait: int = 1
    ) -> None:
        super().__init__(name, gate)
        self.calls = calls or Plan()
        self.wait = wait

    def url(self, path: str = "/hook") -> str:
        """The URL of a path here."""
        return f"http://127.0.0.1:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = peer_of(writer)
        while True:
            self.working.discard(peer)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            request, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            trouble = self.calls.next()
            if trouble is not None:
                self.calls.met[trouble] += 1
            self.working.add(peer)
            if trouble is None:
                await self.gate.passes(Moment.BEGUN, peer)
            if trouble is Trouble.TOO_LARGE:
                writer.write(_head("413 Content Too Large", "Connection: close"))
                await writer.drain()
                raise Gone
            content = await reader.readexactly(int(headers.get("content-length", "0")))
            received = self._note(headers.get("webhook-id", ""), request.split()[1], content, writer)
            if trouble is None or trouble in _ACCEPTING:
                await self._keep(received)
            if trouble is None:
                await self.gate.passes(Moment.ACCEPTED, peer)
                writer.write(_OK)
                await writer.drain()
                received.answer_time = time.time()
            else:
                await self._misbehave(trouble, received, reader, writer)

    async def _misbehave(
        self, trouble: Trouble, received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        match trouble:
            case Trouble.CLOSES | Trouble.ACCEPTS_AND_CLOSES:
                raise Gone
            case Trouble.HANGS | Trouble.ACCEPTS_AND_HANGS:
                await until_gone(reader)
            case Trouble.HALF_HEADER | Trouble.ACCEPTS_AND_CUTS:
                await half(writer, _OK[:30])
            case Trouble.DRIPS:
                await drip(reader, writer, _head("503 Service Unavailable"))
            case Trouble.ACCEPTS_AND_DRIPS:
                await drip(reader, writer, _OK)
                received.answer_time = time.time()
            case Trouble.ENDLESS_ERROR:
                await self._pour(_head("500 Internal Server Error", length=_ENDLESS), reader, writer)
            case Trouble.ACCEPTS_ENDLESSLY:
                await self._pour(_head("200 OK", length=_ENDLESS), reader, writer, received)
            case Trouble.ACCEPTS_WITHOUT_BODY | Trouble.ACCEPTS_AND_BREAKS:
                writer.write(_head("200 OK", length=100))
                await writer.drain()
                received.answer_time = time.time()
                if trouble is Trouble.ACCEPTS_AND_BREAKS:
                    raise Gone
                await until_gone(reader)
            case _:
                writer.write(self._refusal(trouble))
                await writer.drain()

    def _refusal(self, trouble: Trouble) -> bytes:
        """A whole answer that says no."""
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=self.wait), usegmt=True)
        return {
            Trouble.REDIRECT: _head("307 Temporary Redirect", f"Location: {self.url('/elsewhere')}"),
            Trouble.NOT_FOUND: _head("404 Not Found", length=5) + b"no\0pe",
            Trouble.GONE: _head("410 Gone"),
            Trouble.BUSY_SECONDS: _busy(str(self.wait)),
            Trouble.BUSY_DATE: _busy(date),
            Trouble.ERROR: _head("500 Internal Server Error", length=7) + b"sor\r\nry",
            Trouble.NO_HTTP: b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        }[trouble]

    async def _pour(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        received: Received | None = None,
    ) -> None:
        """An answer whose body has no end."""
        writer.write(head)
        await writer.drain()
        if received is not None:
            received.answer_time = time.time()
        gone = asyncio.ensure_future(until_gone(reader))
        try:
            while not gone.done():
                writer.write(b"more and more\n" * 64)
                await writer.drain()
                # Not faster than anybody reads it: a client that never stops would starve this loop.
                await asyncio.sleep(0.001)
        finally:
            gone.cancel()
        raise Gone
