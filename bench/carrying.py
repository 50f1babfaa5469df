"""The client library alone: carries what a notification service has carried, as a process of its own.

python -m bench.carrying webhook --url U --to http://127.0.0.1:8080/hook --after 0 --messages 5000 --at-once 32
python -m bench.carrying email --url U --to 127.0.0.1:2525 --after 0 --messages 5000 --at-once 32

Reads the contents of deliveries of a database, makes of them what goes over the wire, and prints "live"; told anything
on its input it sends, and prints one JSON object at its end. `webhook` is an aiohttp session with as many connections
as there are senders, `email` is aiosmtplib with a kept connection for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import aiosmtplib
import psycopg
import uvloop

from notification_service.channels import Message
from notification_service.channels.email import build

_SENDER = "no-reply@tidings.localhost"
_QUERY = """
SELECT target, idempotency_key, content, create_time FROM deliveries JOIN contents ON delivery_id = id
WHERE channel = %s AND position > %s ORDER BY position LIMIT %s
"""
# As long as one of the service's.
_SIGNATURE = "v1," + "a" * 44


async def webhooks(to: str, messages: list[Message], at_once: int) -> Callable[[], Coroutine[Any, Any, None]]:
    """Posts each with its headers."""
    made = [
        (
            one.content,
            {
                "Content-Type": "application/json",
                "webhook-id": one.idempotency_key,
                "webhook-timestamp": str(int(datetime.now(UTC).timestamp())),
                "webhook-signature": _SIGNATURE,
            },
        )
        for one in messages
    ]
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once))

    async def send(left: Iterator[tuple[bytes, dict[str, str]]]) -> None:
        for content, headers in left:
            async with session.post(to, data=content, headers=headers) as response:
                await response.read()
                response.raise_for_status()

    async def run() -> None:
        left = iter(made)
        async with session:
            await asyncio.gather(*(send(left) for _ in range(at_once)))

    return run


async def mails(to: str, messages: list[Message], at_once: int) -> Callable[[], Coroutine[Any, Any, None]]:
    """Sends each over the connection of its sender."""
    made = [(one.target, build(one, _SENDER, one.target)) for one in messages]
    host, _, port = to.rpartition(":")
    clients = [aiosmtplib.SMTP(hostname=host, port=int(port), start_tls=False) for _ in range(at_once)]
    for client in clients:
        await client.connect()
        await client.ehlo()

    async def send(client: aiosmtplib.SMTP, left: Iterator[tuple[str, bytes]]) -> None:
        for target, content in left:
            await client.mail(_SENDER)
            await client.rcpt(target)
            await client.data(content)

    async def run() -> None:
        left = iter(made)
        await asyncio.gather(*(send(client, left) for client in clients))
        for client in clients:
            client.close()

    return run


_CLIENTS = {"webhook": webhooks, "email": mails}


async def run(what: str, url: str, to: str, after: int, count: int, at_once: int) -> dict[str, float]:
    """Reads, waits until it is told, sends."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        cursor = await connection.execute(_QUERY, [what, after, count], binary=True)
        messages = [Message(*row) for row in await cursor.fetchall()]
    send = await _CLIENTS[what](to, messages, at_once)
    print("live", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    processor, begun = time.process_time(), time.perf_counter()
    await send()
    return {
        "messages": len(messages),
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time() - processor,
    }


def main() -> None:
    """Reads the arguments, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=_CLIENTS)
    parser.add_argument("--url", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--at-once", type=int, default=32)
    asked = parser.parse_args()
    told = uvloop.run(run(asked.what, asked.url, asked.to, asked.after, asked.messages, asked.at_once))
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
