"""What the run works against: a Postgres, a user service, replicas of the notification service, and servers for their
mail and calls that misbehave.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil  # type: ignore[import-untyped]

from tests.delivery_faults import expected
from tests.delivery_faults.evidence import Bounds, Deed
from tests.faults.site import MEMORY, Member, fetch, supervise
from tests.harness import Database, PostgresServer, Services
from tests.harness.bad import BadServer, Gate, Plan
from tests.harness.bad_http import BadHttp
from tests.harness.bad_http import Trouble as HttpTrouble
from tests.harness.bad_smtp import OF_CONNECTIONS, OF_MAILS, BadSmtp

BOUNDS = Bounds(timeout=1.5, lease=3.0, parked_holds=frozenset({"email"}))
# Of what is asked of a server so much meets trouble.
_SHARE = 0.3
_MAILS, _SLOTS = 2, 12
_SECRET = "whsec_" + "A" * 32

# Short pauses, so that much happens; a lease that a paused process outlasts within seconds.
SETTINGS: dict[str, object] = {
    "mail_from": f"Tidings <no-reply@{expected.SENDER_DOMAIN}>",
    "rules_file": expected.RULES_FILE,
    "webhook_networks": "127.0.0.0/8",
    "email_slots": _SLOTS,
    "webhook_slots": _SLOTS,
    "send_timeout": BOUNDS.timeout,
    "lease": BOUNDS.lease,
    "tries": 5,
    "retry_base": 0.1,
    "retry_factor": 2,
    "retry_cap": 1.0,
    "breaker_failures": 6,
    "breaker_pause": 0.2,
    "breaker_cap": 1.0,
    "poll_interval": 0.3,
    "feed_bookmark_interval": 1,
    "shards": 4,
    "shard_lease": 1,
    "drain_time": 1,
    "grace": 1,
}
_USERS: dict[str, object] = {"poll_interval": 0.5, "drain_time": 1, "grace": 1}


@dataclass(slots=True)
class Site:
    """All of it."""

    postgres: PostgresServer
    users_database: Database
    database: Database
    users: Member
    replicas: list[Member]
    mails: list[BadSmtp]
    hooks: list[BadHttp]
    gate: Gate
    deeds: list[Deed] = field(default_factory=list)

    @property
    def servers(self) -> Sequence[BadServer]:
        """All servers."""
        return [*self.mails, *self.hooks]

    @property
    def endpoints(self) -> dict[str, str]:
        """The targets of the webhook endpoints, by name."""
        return {one.name: one.url(f"/{one.name}") for one in self.hooks}

    async def fetch(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """All rows of a query on the notifications, asked again until the database is there."""
        return await fetch(self.database, query, *values)

    def working(self, replica: Member | None = None) -> bool:
        """Whether a replica, or any, is handing something over to a server just now."""
        busy = set().union(*(server.working for server in self.servers))
        return bool(busy if replica is None else busy & ports(replica))

    def channel(self, chance: random.Random) -> grpc.aio.Channel:
        """To one of the replicas."""
        return grpc.aio.insecure_channel(chance.choice(self.replicas).process.address)

    def behave(self) -> None:
        """No trouble from now on."""
        for mail in self.mails:
            mail.greetings.calm()
            mail.mails.calm()
        for hook in self.hooks:
            hook.calls.calm()

    async def calm(self) -> None:
        """Returns when every process is ready."""
        for member in (self.users, *self.replicas):
            async with member.lock:
                await member.revive()


def ports(member: Member) -> set[int]:
    """The local ports of a process's connections."""
    try:
        found = psutil.Process(member.process.pid).net_connections(kind="tcp4")
    except psutil.Error:
        return set()
    return {one.laddr.port for one in found}


@asynccontextmanager
async def opened(replicas: int, seed: int, broken: str | None) -> AsyncIterator[Site]:
    """A site with everything ready; ends it all. With `broken` the notification service runs with that fault switch."""
    async with AsyncExitStack() as stack:
        postgres = await PostgresServer.start(MEMORY if MEMORY.is_dir() else None)
        stack.push_async_callback(postgres.stop)
        databases = await postgres.users_database(), await postgres.notifications_database()
        services = Services()
        stack.push_async_callback(services.stop)
        gate = Gate()
        mails = [
            await stack.enter_async_context(
                BadSmtp(
                    f"mail{number}",
                    Plan(OF_CONNECTIONS, seed=f"{seed} greetings {number}", share=_SHARE),
                    Plan(OF_MAILS, seed=f"{seed} mails {number}", share=_SHARE),
                    gate,
                )
            )
            for number in range(_MAILS)
        ]
        hooks = [
            await stack.enter_async_context(
                BadHttp(name, Plan(HttpTrouble, seed=f"{seed} calls {name}", share=_SHARE), gate)
            )
            for name in expected.ENDPOINTS
        ]
        users = Member(0, services.users(databases[0], **_USERS))
        await users.process.start(60)
        files = _files(Path(stack.enter_context(tempfile.TemporaryDirectory())), mails, hooks)
        module = ("tests.delivery_faults.broken", broken, "serve") if broken else ("notification_service", "serve")
        made = [
            Member(number, services.notifications(databases[1], users.process, command=module, **SETTINGS, **files))
            for number in range(replicas)
        ]
        site = Site(postgres, *databases, users, made, mails, hooks, gate)
        await asyncio.gather(*(one.process.start(60) for one in made))
        watching = asyncio.create_task(supervise([users, *made]))
        try:
            yield site
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _files(directory: Path, mails: Sequence[BadSmtp], hooks: Sequence[BadHttp]) -> dict[str, Path]:
    """The operator's files."""
    texts = {
        "providers_file": [
            f'[[providers]]\nname = "{one.name}"\nhost = "127.0.0.1"\nport = {one.port}\ntls = "off"\n' for one in mails
        ],
        "webhooks_file": [
            f'[[endpoints]]\nname = "{one.name}"\nurl = "{one.url(f"/{one.name}")}"\nsecret = "{_SECRET}"\n'
            + "".join(
                f"{key} = {sorted(values)}\n"
                for key, values in zip(("events", "categories"), expected.ENDPOINTS[one.name], strict=True)
                if values
            )
            for one in hooks
        ],
        "policies_file": [
            f'[[policies]]\nname = "{name}"\nparked_holds = {str(name in BOUNDS.parked_holds).lower()}\n'
            for name in ("email", "webhook")
        ],
    }
    for name, parts in texts.items():
        (directory / name).write_text("\n".join(parts), encoding="utf-8")
    return {name: directory / name for name in texts}


def note(site: Site, kind: str, what: str, at: float, *, hit: bool) -> None:
    """Writes down what was done from `at` until now."""
    site.deeds.append(Deed(kind, what, at, time.time(), hit))
