"""A mail server or a webhook endpoint that throws away what it takes, as light as Python makes one.

python -m bench.receiving smtp|http

Prints its address. It is closed, which it tells everybody (421, 503), until it is told a number on its input: then it
takes so many messages, prints one JSON object with the seconds from the first of them to the last, and is closed again.
Nothing is parsed but what says where a message ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import cast

import uvloop

_CLOSED = b"421 closed\r\n"
_OK = b"250 OK\r\n"
_HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_HTTP_CLOSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


class Door:
    """Lets so many messages in, and says when they were."""

    def __init__(self) -> None:
        self.left = 0
        self._count = 0
        self._first = 0.0

    def open(self, count: int) -> None:
        """Lets `count` messages in from now on."""
        self.left = self._count = count

    def take(self) -> bool:
        """Whether one more is let in."""
        if not self.left:
            return False
        if self.left == self._count:
            self._first = time.perf_counter()
        self.left -= 1
        if not self.left:
            print(json.dumps({"seconds": time.perf_counter() - self._first}), flush=True)
        return True


class Smtp(asyncio.Protocol):
    """One connection of a mail client."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._buffer = bytearray()
        self._in_data = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"220 sink\r\n")

    def data_received(self, data: bytes) -> None:
        """Answers what has come as a whole."""
        buffer = self._buffer
        buffer += data
        while True:
            end = buffer.find(b"\r\n.\r\n" if self._in_data else b"\r\n")
            if end < 0:
                return
            if self._in_data:
                del buffer[: end + 5]
                self._in_data = False
                self._transport.write(_OK if self._door.take() else _CLOSED)
                continue
            verb = bytes(buffer[:4]).upper()
            del buffer[: end + 2]
            self._answer(verb)

    def _answer(self, verb: bytes) -> None:
        if verb == b"MAIL" and not self._door.left:
            self._transport.write(_CLOSED)
            self._transport.close()
        elif verb == b"DATA":
            self._in_data = True
            self._transport.write(b"354 go on\r\n")
        elif verb == b"EHLO":
            self._transport.write(b"250-sink\r\n250 SMTPUTF8\r\n")
        else:
            self._transport.write(_OK)


class Http(asyncio.Protocol):
    """One connection of a caller of webhooks."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is said before a request has come."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answers requests that have come as a whole."""
        buffer = self._buffer
        buffer += data
        while (head := buffer.find(b"\r\n\r\n")) >= 0:
            text = bytes(buffer[:head]).lower()
            at = text.index(b"content-length:") + 15
            size = int(text[at : text.find(b"\r\n", at) if b"\r\n" in text[at:] else None])
            if len(buffer) < head + 4 + size:
                return
            del buffer[: head + 4 + size]
            self._transport.write(_HTTP_OK if self._door.take() else _HTTP_CLOSED)


async def serve(what: str) -> None:
    """Prints its address, then receives until it is ended."""
    door, loop = Door(), asyncio.get_running_loop()
    protocol = Smtp if what == "smtp" else Http
    server = await loop.create_server(lambda: protocol(door), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(f"{host}:{port}", flush=True)
    told = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    async for line in told:
        door.open(int(line))


def main() -> None:
    """Reads the arguments, receives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("smtp", "http"))
    uvloop.run(serve(parser.parse_args().what))


if __name__ == "__main__":
    main()
