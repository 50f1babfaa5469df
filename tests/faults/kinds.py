"""What the run does to the system: one function for each kind of fault.

A function strikes one replica, or Postgres, and returns when it has put things right again. It tells the `Blow` when it
struck and, where it knows, whether it hit work in flight; otherwise the calls that were open then will tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.faults.site import Replica, Site
from tests.harness import Action, Fault, is_commit, sql_contains
from tests.harness.wire import Message

WRITER = "tidings-users-writer"
_locks_feed = sql_contains("FROM feed FOR UPDATE")
# How long a precise fault waits for the instant that it is for.
_PATIENCE = 4.0


@dataclass(slots=True)
class Blow:
    """When a fault struck (0: never), and whether it hit work in flight (None: the calls that were open tell)."""

    at: float = 0.0
    hit: bool | None = None

    def now(self, hit: bool | None = None) -> None:
        """It strikes."""
        self.at = time.monotonic()
        self.hit = hit


@contextmanager
def _armed(
    replica: Replica, action: Action, when: Callable[[Message], bool], application: str = WRITER
) -> Iterator[Fault]:
    fault = replica.proxy.arm(application, action, when)
    try:
        yield fault
    finally:
        fault.disarm()
        fault.release()


async def _happens(fault: Fault) -> bool:
    with contextlib.suppress(AssertionError):
        await fault.happened(timeout=_PATIENCE)
    return fault.hits > 0


async def _work_begins(replica: Replica, chance: random.Random) -> None:
    """Returns some milliseconds after the replica has begun to commit something."""
    with _armed(replica, Action.HOLD_AFTER, _locks_feed) as fault:
        await _happens(fault)
    await asyncio.sleep(chance.random() * 0.01)


# To a replica


async def killed(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGKILL at any moment."""
    await _work_begins(replica, chance)
    blow.now()
    await replica.process.kill()
    await replica.revive()


async def _killed_at(
    replica: Replica, action: Action, when: Callable[[Message], bool], blow: Blow, application: str = WRITER
) -> None:
    with _armed(replica, action, when, application) as fault:
        if not await _happens(fault):
            return
        blow.now(hit=True)
        await replica.process.kill()
    await replica.revive()


async def killed_before_commit(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGKILL while it holds the counter and has not sent COMMIT, or has sent it and Postgres has not got it."""
    action, when = chance.choice([(Action.HOLD_AFTER, _locks_feed), (Action.HOLD_BEFORE, is_commit)])
    await _killed_at(replica, action, when, blow)


async def killed_after_commit(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGKILL when Postgres has committed and it does not know yet."""
    await _killed_at(replica, Action.HOLD_AFTER, is_commit, blow)


async def paused(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGSTOP at any moment, for up to 2 s."""
    await _work_begins(replica, chance)
    blow.now()
    replica.process.send(signal.SIGSTOP)
    await asyncio.sleep(0.2 + chance.random() * 1.8)
    replica.process.send(signal.SIGCONT)


async def paused_before_commit(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGSTOP while it holds the counter, until Postgres has ended its session."""
    with _armed(replica, Action.HOLD_AFTER, _locks_feed) as fault:
        if not await _happens(fault):
            return
        blow.now(hit=True)
        replica.process.send(signal.SIGSTOP)
    await asyncio.sleep(2.5)
    replica.process.send(signal.SIGCONT)


async def _cut_at(replica: Replica, action: Action, blow: Blow) -> None:
    with _armed(replica, action, is_commit) as fault:
        if await _happens(fault):
            blow.now(hit=True)


async def cut_before_commit(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """The writer's connection breaks before Postgres has got COMMIT."""
    await _cut_at(replica, Action.CUT_BEFORE, blow)


async def cut_after_commit(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """The writer's connection breaks after Postgres has committed, before the answer: `pg_xact_status` is asked."""
    asked = len(replica.process.events("asked for the outcome of a commit"))
    await _cut_at(replica, Action.CUT_AFTER, blow)
    deadline = time.monotonic() + _PATIENCE
    while blow.at and time.monotonic() < deadline:
        if len(replica.process.events("asked for the outcome of a commit")) > asked:
            return
        await asyncio.sleep(0.05)
    blow.hit = False


async def unreachable(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """All its connections break, and for up to 2 s it gets no others."""
    await _work_begins(replica, chance)
    blow.now()
    replica.proxy.refusing = True
    replica.proxy.cut()
    await asyncio.sleep(chance.random() * 2)
    replica.proxy.refusing = False


async def drained(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGTERM and a new process, as in a rollout."""
    await _work_begins(replica, chance)
    blow.now()
    await replica.process.stop()
    await replica.revive()


# To a replica that seals old events and removes older ones


async def killed_while_sealing(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGKILL while it moves events into a segment: before the statement, after it, or before COMMIT."""
    seals = sql_contains("INSERT INTO segments")
    action, when = chance.choice(
        [(Action.HOLD_BEFORE, seals), (Action.HOLD_AFTER, seals), (Action.HOLD_BEFORE, is_commit)]
    )
    await _killed_at(replica, action, when, blow, "tidings-users-sealer")


async def killed_while_removing(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGKILL while it removes segments whose time is over: before Postgres has got the statement, or after."""
    action = chance.choice([Action.HOLD_BEFORE, Action.HOLD_AFTER])
    # Another replica may be the one that removes, and segments are due only now and then.
    deadline = time.monotonic() + 3 * _PATIENCE
    while not blow.at and time.monotonic() < deadline:
        edge = await _edge(site)
        with _armed(replica, action, sql_contains("DELETE FROM segments"), "tidings-users-queries") as fault:
            if not await _happens(fault):
                return
            # Most of the time there is nothing to remove.
            due = await site.fetch("SELECT FROM segments WHERE last_time < now() - %s * interval '1 second'", site.kept)
            if due if action is Action.HOLD_BEFORE else await _edge(site) > edge:
                blow.now(hit=True)
                await replica.process.kill()
    await replica.revive()


async def _edge(site: Site) -> int:
    [[earliest]] = await site.fetch("SELECT earliest_position FROM feed")
    return int(str(earliest))


# To Postgres


async def backend_killed(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """SIGKILL of a writer's backend inside its transaction: Postgres ends every session and recovers."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        found = await site.fetch(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle' LIMIT 1", WRITER
        )
        if found:
            blow.now()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(str(found[0][0])), signal.SIGKILL)
            await asyncio.sleep(0.2)
            await site.fetch("SELECT 1")
            return
        await asyncio.sleep(0.005)


async def postgres_crashed(site: Site, replica: Replica, chance: random.Random, blow: Blow) -> None:
    """Postgres is stopped in immediate mode and started again."""
    await _work_begins(replica, chance)
    blow.now()
    await site.postgres.crash()
    await site.fetch("SELECT 1")


Strike = Callable[[Site, Replica, random.Random, Blow], Awaitable[None]]
REPLICA_FAULTS: dict[str, Strike] = {
    "service killed (-9)": killed,
    "service killed between counter and COMMIT": killed_before_commit,
    "service killed between COMMIT and its answer": killed_after_commit,
    "service paused": paused,
    "service paused between counter and COMMIT": paused_before_commit,
    "connection cut before COMMIT": cut_before_commit,
    "connection cut after COMMIT, outcome asked": cut_after_commit,
    "database unreachable": unreachable,
    "service drained and restarted": drained,
    "service killed while sealing": killed_while_sealing,
    "service killed while removing old events": killed_while_removing,
}
POSTGRES_FAULTS: dict[str, Strike] = {
    "Postgres backend killed (-9)": backend_killed,
    "Postgres stopped at once and restarted": postgres_crashed,
}
KINDS = (*REPLICA_FAULTS, *POSTGRES_FAULTS)
