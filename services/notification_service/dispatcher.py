"""The dispatcher: leases due deliveries, sends them, records how it went.

One lane per channel with so many slots. A lane leases at most as many deliveries as it has free slots, and a slot is
free again only when the outcome is recorded: so what is leased is what is on its way, and a process that is killed
leaves at most that to be sent twice. The lease records the attempt as UNKNOWN before anything is sent. It also
fences: an outcome counts only if nobody leased the delivery again in the meantime.

Lanes sleep until there is something to do: new work of this process wakes them, a poll finds the rest (retries that
fell due, other replicas' work, leases of the dead).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

import psycopg

from notification_service import metrics, retries, tracing
from notification_service.channels import Channel, Message, Outcome
from notification_service.domain import Ended, Leased, Result, State
from notification_service.retries import Policy
from notification_service.store import leases
from servicekit import logs, tasks
from servicekit.database import Connection, Pool

log = logs.get(__name__)

_T = TypeVar("_T")

# How long a lane waits for more free slots, so that one lease serves several.
_LINGER = 0.01
_MOST_RECORDED = 500
_LONGEST_PAUSE = 2.0


@dataclass(frozen=True, slots=True)
class Lane:
    """A channel and how much may be on its way over it."""

    channel: Channel
    slots: int


@dataclass(slots=True)
class _Running:
    """A lane at work."""

    name: str
    channel: Channel
    slots: int
    work: asyncio.Event = field(default_factory=asyncio.Event)
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    busy: dict[uuid.UUID, asyncio.Task[None]] = field(default_factory=dict)


class Dispatcher:
    """All lanes of this process. `run_lane` of each name, `record` and `tidy` are loops for the caller's supervisor."""

    def __init__(
        self,
        pool: Pool,
        lanes: Mapping[str, Lane],
        policy: Policy,
        *,
        send_timeout: float,
        lease: float,
        poll_interval: float,
    ) -> None:
        self._pool = pool
        self._lanes = {name: _Running(name, lane.channel, lane.slots) for name, lane in lanes.items()}
        self._policy = policy
        self._send_timeout = send_timeout
        self._lease = lease
        self._poll_interval = poll_interval
        self._ended: list[tuple[_Running, Ended]] = []
        self._any_ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._leasing = 0
        self._draining = False

    def wake(self) -> None:
        """There is new work."""
        for lane in self._lanes.values():
            lane.work.set()

    @property
    def busy(self) -> int:
        """How many deliveries are on their way."""
        return sum(len(lane.busy) for lane in self._lanes.values())

    async def run_lane(self, name: str) -> None:
        """Leases and sends over one channel."""
        lane = self._lanes[name]
        while True:
            with tasks.resting():
                await self._room(lane)
            lane.work.clear()
            free = lane.slots - len(lane.busy)
            # From before the lease on there may be something to wait for at a shutdown.
            self._leasing += 1
            self._idle.clear()
            leased = await self._retried(lambda connection: self._take(connection, lane, free))  # noqa: B023 - awaited here
            for one in leased:
                lane.busy[one.id] = asyncio.create_task(self._send(lane, one), name=f"deliver-{one.id}")
            self._leasing -= 1
            self._settle()
            if len(leased) < free:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_interval):
                        await lane.work.wait()

    def _settle(self) -> None:
        if not self._leasing and not self.busy:
            self._idle.set()

    async def _take(self, connection: Connection, lane: _Running, most: int) -> list[Leased]:
        if self._draining:
            return []
        return await leases.lease(
            connection, lane.name, most, seconds=self._lease, max_tries=self._policy.tries, busy=list(lane.busy)
        )

    async def _room(self, lane: _Running) -> None:
        """Returns when enough slots are free, or some are and no more became free for a moment."""
        while len(lane.busy) >= lane.slots:
            lane.freed.clear()
            await lane.freed.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while len(lane.busy) > lane.slots // 2:
                    lane.freed.clear()
                    await lane.freed.wait()

    async def _send(self, lane: _Running, leased: Leased) -> None:
        began = perf_counter()
        with tracing.attempt(leased) as attempt:
            message = Message(
                target=leased.target,
                idempotency_key=leased.idempotency_key,
                content=leased.content,
                create_time=leased.create_time,
                trace_parent=attempt.trace_parent,
                trace_state=attempt.trace_state,
            )
            try:
                async with asyncio.timeout(self._send_timeout):
                    outcome = await lane.channel.send(message)
            except TimeoutError:
                outcome = Outcome(Result.FAILED, detail=f"no answer within {self._send_timeout:g} s")
            except Exception as error:
                log.exception("a channel failed unexpectedly", channel=lane.name, delivery_id=str(leased.id))
                outcome = Outcome(Result.FAILED, detail=f"internal error: {type(error).__name__}")
            attempt.ended(outcome)
        metrics.attempted(lane.name, outcome.result, began, leased.event_id)
        ended = retries.decide(self._policy, leased, outcome)
        if ended.state is State.PARKED:
            log.warning(
                "delivery parked",
                channel=lane.name,
                delivery_id=str(leased.id),
                attempt=leased.number,
                # Without what the other side said, which may name the user.
                outcome=outcome.result.name,
                code=outcome.code,
            )
        self._ended.append((lane, ended))
        self._any_ended.set()

    async def record(self) -> None:
        """Records outcomes, all that are there at once, and frees their slots."""
        while True:
            with tasks.resting():
                await self._any_ended.wait()
            self._any_ended.clear()
            while batch := self._ended[:_MOST_RECORDED]:
                ended = [one for _, one in batch]
                recorded = await self._retried(lambda connection: leases.record(connection, ended))  # noqa: B023
                for one in ended:
                    if one.id not in recorded:
                        log.warning("outcome dropped: the lease was lost", delivery_id=str(one.id), attempt=one.number)
                del self._ended[: len(batch)]
                for lane, one in batch:
                    del lane.busy[one.id]
                    lane.freed.set()
                self._settle()

    async def tidy(self) -> None:
        """Parks what no attempt of ever had an answer."""
        while True:
            parked = await self._retried(lambda connection: leases.park_exhausted(connection, self._policy.tries))
            for identity in parked:
                log.warning("delivery parked", delivery_id=str(identity), reason="the last attempt had no answer")
            await asyncio.sleep(self._lease / 2)

    async def _retried(self, action: Callable[[Connection], Awaitable[_T]]) -> _T:
        """Does something in the database, as often as it takes to reach it."""
        pause = 0.05
        while True:
            tasks.beat()
            try:
                async with self._pool.connection() as connection:
                    return await action(connection)
            except psycopg.OperationalError as error:
                log.warning("deliveries: database not reachable", error=str(error).strip(), retry_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def drain(self, timeout: float) -> None:
        """Takes no more work; returns when what is on its way is recorded, or gives it up after `timeout` seconds."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        left = [task for lane in self._lanes.values() for task in lane.busy.values()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if left:
            log.warning("attempts given up at shutdown", attempts=len(left))
        for lane in self._lanes.values():
            await lane.channel.close()
