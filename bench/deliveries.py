"""Deliveries of the notification service to a local endpoint or mail server, against its client library alone.

Users are created; by rules of one channel each becomes one delivery, a webhook with its signature or a mail in two
parts. Deliveries are stored while the receiver, a process of its own, is closed. Then it is opened: the time is from
the first message that it takes to the last. The client alone (bench.carrying) sends the same bytes, made beforehand, to
the same receiver: aiohttp with as many connections as the service has slots, aiosmtplib with as many connections that
are kept. Rounds take turns.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import psycopg

from bench import filling
from bench.measure import Sizes, Value, ratios
from bench.stack import Stack, first_line, own_processor, processor, result

SIZES = Sizes(rounds=5, events=10_000)
QUICK = Sizes(rounds=1, events=2_000)

_SLOTS = 32
_LOOK = 0.02
_RULES = """
[[rules]]
name = "welcome"
on = ["CREATED"]
template = "welcome"
category = "account"
channels = ["{channel}"]
"""
_ENDPOINTS = """
[[endpoints]]
name = "sink"
url = "http://{address}/hook"
secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
"""
_RECEIVERS = {"webhook": "http", "email": "smtp"}


class _Receiver:
    """A receiver, as who opens it sees it."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address
        self.pid = process.pid

    async def open(self, messages: int) -> None:
        """Lets so many messages in."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{messages}\n".encode())
        await self._process.stdin.drain()

    async def took(self) -> float:
        """Seconds from the first of them to the last."""
        told: dict[str, Any] = json.loads(await first_line(self._process))
        return float(told["seconds"])


async def run(stack: Stack, sizes: Sizes) -> AsyncIterator[Value]:
    """One channel after the other, each with databases of its own."""
    for channel, receives in _RECEIVERS.items():
        process = await stack.start("bench.receiving", receives)
        receiver = _Receiver(process, await first_line(process))
        users_url = await stack.database(f"users_{channel}")
        url = await stack.database(f"notifications_{channel}", "notifications")
        users = await stack.users(users_url)
        service = await stack.notifications(url, users, **_settings(stack, channel, receiver.address))
        to = f"http://{receiver.address}/hook" if channel == "webhook" else receiver.address
        speeds: defaultdict[str, list[float]] = defaultdict(list)
        costs: defaultdict[str, list[float]] = defaultdict(list)
        pid = stack.pids[service]
        async with (
            await psycopg.AsyncConnection.connect(users_url, autocommit=True) as log,
            await psycopg.AsyncConnection.connect(url, autocommit=True) as stored,
        ):
            head = 0
            for number in range(-1, sizes.rounds):
                before, head = head, await filling.append(log, sizes.events)
                await _stored(stored, head)
                bare = await stack.live(
                    "bench.carrying", channel, "--url", url, "--to", to,
                    "--after", before, "--messages", sizes.events, "--at-once", _SLOTS,
                )  # fmt: skip
                sides = {"service": -own_processor(pid), "Postgres": -processor(stack.postgres_pid)}
                await receiver.open(sizes.events)
                took = await receiver.took()
                await _delivered(stored)
                sides["service"] += own_processor(pid)
                sides["Postgres"] += processor(stack.postgres_pid)
                receiving = processor(receiver.pid)
                await receiver.open(sizes.events)
                alone = await result(bare, "go\n")
                await receiver.took()
                receiving = processor(receiver.pid) - receiving
                if number < 0:  # warms caches, opens connections, prepares statements
                    continue
                speeds[channel].append(sizes.events / took)
                speeds["client alone"].append(sizes.events / alone["seconds"])
                for side, seconds in sides.items():
                    costs[f"{channel}: {side}"].append(seconds / sizes.events * 1e6)
                costs["client alone"].append(alone["processor"] / sizes.events * 1e6)
                costs["receiver"].append(receiving / sizes.events * 1e6)
        await stack.end(service)
        await stack.end(users)
        for name, values in speeds.items():
            yield Value(f"{channel}, {name}" if name != channel else name, "deliveries/s", tuple(values))
        for name, values in costs.items():
            yield Value(
                f"{channel}, {name}, processor" if ":" not in name else f"{name}, processor",
                "µs/delivery",
                tuple(values),
            )
        yield ratios(f"{channel} / client alone", speeds[channel], speeds["client alone"])


def _settings(stack: Stack, channel: str, address: str) -> Mapping[str, str]:
    rules, endpoints = stack.directory / f"{channel}.rules.toml", stack.directory / f"{channel}.endpoints.toml"
    rules.write_text(_RULES.format(channel=channel))
    host, _, port = address.rpartition(":")
    variables = {
        "RULES_FILE": str(rules),
        f"{channel.upper()}_SLOTS": str(_SLOTS),
        # A closed receiver is found open soon.
        "BREAKER_FAILURES": "1",
        "BREAKER_PAUSE": "0.5",
        "BREAKER_CAP": "0.5",
    }
    if channel == "webhook":
        endpoints.write_text(_ENDPOINTS.format(address=address))
        variables |= {"WEBHOOKS_FILE": str(endpoints), "WEBHOOK_NETWORKS": "127.0.0.0/8"}
    else:
        variables |= {"SMTP_HOST": host, "SMTP_PORT": port}
    return {f"TIDINGS_NOTIFICATIONS_{name}": value for name, value in variables.items()}


async def _stored(connection: filling.Connection, position: int) -> None:
    """Returns when the inbox has passed a position."""
    while True:
        cursor = await connection.execute("SELECT coalesce(max(position), 0) FROM inbox")
        if (await cursor.fetchall())[0][0] >= position:
            return
        await asyncio.sleep(_LOOK)


async def _delivered(connection: filling.Connection) -> None:
    """Returns when every delivery is recorded as delivered."""
    while True:
        cursor = await connection.execute("SELECT count(*) FROM deliveries WHERE state <> 2")
        if not (await cursor.fetchall())[0][0]:
            return
        await asyncio.sleep(_LOOK)
