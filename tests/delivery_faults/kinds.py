"""What the run does to replicas and to Postgres: one function for each kind of fault, as in `tests.faults.kinds`.

A function strikes and returns when it has put things right again. What it did it notes with the time from which work on
its way was in danger, and whether any was: a server was in the middle of a message of the one that was struck.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial

from tests.delivery_faults.evidence import AWAY, KILLED, PAUSED
from tests.delivery_faults.site import BOUNDS, Site, note, ports
from tests.faults.site import Member
from tests.harness.bad import Moment

# How long a fault waits for work that it can hit.
_PATIENCE = 4.0
_ANY: Moment | None = None


async def _begins(site: Site, replica: Member) -> bool:
    """Waits until the replica hands something over; whether it does."""
    deadline = time.monotonic() + _PATIENCE
    while not site.working(replica):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def _at(site: Site, replica: Member, moment: Moment | None, strike: Callable[[bool], Awaitable[None]]) -> None:
    """Strikes while a server is held at a moment of one of the replica's messages, or at any moment of any."""
    if moment is None:
        await strike(await _begins(site, replica))
        return
    async with site.gate.armed(moment, lambda peer: peer in ports(replica)) as hold:
        happened = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await hold.happened.wait()
            happened = True
        if happened:
            await strike(True)


async def _killed(site: Site, replica: Member, chance: random.Random, kind: str, moment: Moment | None) -> None:
    async def strike(hit: bool) -> None:
        at = time.time()
        await replica.process.kill()
        note(site, kind, KILLED, at, hit=hit)

    await _at(site, replica, moment, strike)
    await replica.revive()


async def _paused(site: Site, replica: Member, chance: random.Random, kind: str, moment: Moment | None) -> None:
    begun = [0.0, 0.0]

    async def strike(hit: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            replica.process.send(signal.SIGSTOP)
            begun[:] = time.time(), float(hit)

    await _at(site, replica, moment, strike)
    if begun[0]:
        # The server goes on and finds nobody who listens.
        await asyncio.sleep(BOUNDS.lease + 0.3 + chance.random())
        replica.process.send(signal.SIGCONT)
        note(site, kind, PAUSED, begun[0], hit=bool(begun[1]))


async def _backend_killed(site: Site, chance: random.Random, kind: str) -> None:
    """SIGKILL of a backend in the middle of something: Postgres ends every session and recovers."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        found = await site.fetch(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'tidings-notifications-%%'"
            " AND state <> 'idle' AND query NOT LIKE 'LISTEN%%' LIMIT 1"
        )
        if found and site.working():
            at = time.time()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(str(found[0][0])), signal.SIGKILL)
            await asyncio.sleep(0.2)
            await site.fetch("SELECT 1")
            note(site, kind, AWAY, at, hit=True)
            return
        await asyncio.sleep(0.005)


async def _postgres_crashed(site: Site, chance: random.Random, kind: str) -> None:
    """Postgres is stopped in immediate mode and started again."""
    deadline = time.monotonic() + _PATIENCE
    while not site.working() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    at, hit = time.time(), site.working()
    await site.postgres.crash()
    await site.fetch("SELECT 1")
    note(site, kind, AWAY, at, hit=hit)


Strike = Callable[[Site, Member, random.Random, str], Awaitable[None]]
REPLICA_FAULTS: dict[str, Strike] = {
    f"replica {what}{when}": partial(strike, moment=moment)
    for what, strike in (("killed (-9)", _killed), ("paused too long", _paused))
    for when, moment in (
        ("", _ANY),
        (", a message begun", Moment.BEGUN),
        (", accepted and not answered", Moment.ACCEPTED),
    )
}
POSTGRES_FAULTS: dict[str, Callable[[Site, random.Random, str], Awaitable[None]]] = {
    "Postgres backend killed (-9)": _backend_killed,
    "Postgres stopped at once and restarted": _postgres_crashed,
}
REPLAYED, DISCARDED = "parked deliveries replayed", "parked deliveries discarded"
KINDS = (*REPLICA_FAULTS, *POSTGRES_FAULTS, REPLAYED, DISCARDED)
