"""The dispatcher: leases due deliveries, sends them, records how it went.

One lane per channel with so many slots, and one route of the lane for each who can be asked. A lane leases at most as
many deliveries as it has free slots and its routes have room for, and a slot is free again only when the outcome is
recorded: so what is leased is what is on its way, and a process that is killed leaves at most that to be sent twice.
The attempt is recorded as UNKNOWN before anything is sent. That also fences: an outcome counts only if nobody began
another attempt in the meantime.

A route whose breaker is open has no room but for a probe: what would go there stays pending and uses up no tries.

Lanes sleep until there is something to do: new work of this process wakes them, a poll finds the rest (retries that
fell due, other replicas' work, leases of the dead).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import TypeVar

from notification_service import gate, metrics, retries, tracing
from notification_service.categories import Categories
from notification_service.channels import Message, Outcome
from notification_service.domain import TARGET_GONE, TRIES_EXHAUSTED, Ended, Leased, Result, State
from notification_service.gate import Cancel, Candidate, Defer
from notification_service.retries import Policy
from notification_service.routes import Route, Routes
from notification_service.store import leases, outcomes, pending, verdicts
from servicekit import database, logs, tasks
from servicekit.database import Connection, Pool

log = logs.get(__name__)

_T = TypeVar("_T")

# How long a lane waits for more free slots, so that one lease serves several.
_LINGER = 0.01
# How long the recorder waits for more to end, while more than has ended is on its way.
_LINGER_RECORD = 0.005
_MOST_RECORDED = 500
_LONGEST_PAUSE = 2.0
# An attempt that is bounded by a time-out has ended, and is known to have, so many seconds after it at the latest.
_MARGIN = 5.0
# A target that one replica does not know yet may be known to another: so long nothing is cancelled; and how often a
# look for such is worth it. Seconds.
_GONE_AFTER, _LOOK_FOR_GONE = 600.0, 60.0


@dataclass(frozen=True, slots=True)
class Lane:
    """Who is asked over a channel, how often, and how much may be on its way at once."""

    routes: Routes
    policy: Policy
    slots: int


@dataclass(slots=True)
class _Running:
    """A lane at work."""

    name: str
    routes: Routes
    policy: Policy
    slots: int
    work: asyncio.Event = field(default_factory=asyncio.Event)
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    busy: dict[uuid.UUID, asyncio.Task[None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a look for work gave: attempts that have begun, and how long to wait for more; 0 is not at all."""

    begun: list[tuple[Leased, Route]]
    pause: float


class Dispatcher:
    """All lanes of this process. `run_lane` of each name, `record` and `tidy` are loops for the caller's supervisor."""

    def __init__(
        self, pool: Pool, lanes: Mapping[str, Lane], categories: Categories, *, lease: float, poll_interval: float
    ) -> None:
        self._pool = pool
        self._categories = categories
        self._lanes = {name: _Running(name, lane.routes, lane.policy, lane.slots) for name, lane in lanes.items()}
        self._lease = lease
        self._poll_interval = poll_interval
        self._ended: list[tuple[_Running, Ended]] = []
        self._any_ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._leasing = 0
        self._draining = False
        metrics.PAUSED.read = self._paused

    def _paused(self) -> list[tuple[tuple[str, ...], float]]:
        return [
            ((lane.name, route.name), float(route.breaker.is_open))
            for lane in self._lanes.values()
            for route in lane.routes.standing()
        ]

    def away(self, channel: str, target: str) -> str:
        """Who would be asked for a delivery, by name, if all of them are away; else empty."""
        routes = self._lanes[channel].routes.of(target) if channel in self._lanes else ()
        return ", ".join(one.name for one in routes) if all(one.breaker.is_open for one in routes) else ""

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
            # From before the lease on there may be something to wait for at a shutdown.
            self._leasing += 1
            self._idle.clear()
            taken = await self._retried(lambda connection: self._take(connection, lane))
            for leased, route in taken.begun:
                lane.busy[leased.id] = asyncio.create_task(self._send(lane, leased, route), name="deliver")
            self._leasing -= 1
            self._settle()
            if taken.pause:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(taken.pause):
                        await lane.work.wait()

    def _settle(self) -> None:
        if not self._leasing and not self.busy:
            self._idle.set()

    async def _take(self, connection: Connection, lane: _Running) -> _Taken:
        """Leases into a lane's free slots what its routes have room for."""
        if self._draining:
            return _Taken([], self._poll_interval)
        loop, free = asyncio.get_running_loop(), lane.slots - len(lane.busy)
        since = loop.time()
        plan = lane.routes.plan(free, since)
        if not plan.most:
            return _Taken([], min(self._poll_interval, plan.wait))
        picked, behind = await leases.pick(
            connection,
            lane.name,
            plan.most,
            plan.targets,
            seconds=self._lease,
            max_tries=lane.policy.tries,
            parked_holds=lane.policy.parked_holds,
            busy=list(lane.busy),
        )
        chosen: dict[uuid.UUID, tuple[leases.Picked, Route]] = {}
        aside = self._aside(lane, picked)
        if aside:
            await verdicts.set_aside(connection, list(aside.values()))
        for one in picked:
            if one.id in aside:
                continue
            route = lane.routes.choose(one, loop.time())
            if route is not None:
                route.begun(loop.time(), lane.policy.timeout + _MARGIN)
                chosen[one.id] = (one, route)
        begun: list[Leased] = []
        try:
            if chosen:
                named = [(one, route.name if plan.targets is None else "") for one, route in chosen.values()]
                begun = self._in_time(lane, since, await leases.begin(connection, named, max_age=lane.policy.max_age))
            if left := [one for one in picked if one.id not in chosen and one.id not in aside]:
                await leases.give_back(connection, left)
        finally:
            started = {leased.id for leased in begun}
            for identity, (_, route) in chosen.items():
                if identity not in started:
                    route.left()
        more = len(picked) + behind >= plan.most and len(begun) + behind + len(aside) > 0
        pause = 0.0 if more else min(self._poll_interval, max(plan.wait, 0.001))
        return _Taken([(leased, chosen[leased.id][1]) for leased in begun], pause)

    def _in_time(self, lane: _Running, since: float, begun: list[Leased]) -> list[Leased]:
        """What may still be sent: an attempt takes half of a lease at most, so as much of it must be left. Who was
        stopped in between finds it over; others have these by then, and its own attempts stay without an answer.
        """
        if not begun or asyncio.get_running_loop().time() - since <= self._lease / 2:
            return begun
        log.warning("not sent: too little of the lease was left", channel=lane.name, deliveries=len(begun))
        return []

    def _aside(
        self, lane: _Running, picked: Sequence[leases.Picked]
    ) -> dict[uuid.UUID, tuple[leases.Picked, Defer | Cancel]]:
        """What may not be sent now, or never, as its user and the operator want it at this moment."""
        now, aside = datetime.now(UTC), {}
        for one in picked:
            candidate = Candidate(
                one.user_id, one.category, lane.name, one.target, one.time_zone, one.document, one.suppressed
            )
            verdict = gate.decide(candidate, self._categories, now)
            if isinstance(verdict, Defer | Cancel):
                aside[one.id] = (one, verdict)
        return aside

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

    async def _send(self, lane: _Running, leased: Leased, route: Route) -> None:
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
                async with asyncio.timeout(lane.policy.timeout):
                    outcome = await route.channel.send(message)
            except TimeoutError:
                outcome = Outcome(Result.FAILED, detail=f"no answer within {lane.policy.timeout:g} s", outage=True)
            except Exception as error:
                log.exception("a channel failed unexpectedly", channel=lane.name, delivery_id=str(leased.id))
                outcome = Outcome(Result.FAILED, detail=f"internal error: {type(error).__name__}")
            finally:
                route.left()
            attempt.ended(outcome)
        metrics.attempted(lane.name, outcome.result, began, leased.event_id)
        self._learn(lane, route, outcome)
        now = asyncio.get_running_loop().time()
        away, other = route.breaker.is_open, lane.routes.alternative(route, now)
        ended = retries.decide(lane.policy, leased, outcome, away=away, alternative=other)
        if ended.state is State.PARKED:
            log.warning(
                "delivery parked",
                channel=lane.name,
                delivery_id=str(leased.id),
                attempt=leased.number,
                reason=ended.reason,
                # Without what the other side said, which may name the user.
                outcome=outcome.result.name,
                code=outcome.code,
            )
        self._ended.append((lane, ended))
        self._any_ended.set()

    def _learn(self, lane: _Running, route: Route, outcome: Outcome) -> None:
        now, was_open = asyncio.get_running_loop().time(), route.breaker.is_open
        if not route.ended(now, outcome):
            return
        pause = round(route.breaker.wait(now), 1)
        if not route.breaker.is_open:
            log.info("deliveries go on", channel=lane.name, to=route.name)
        elif not was_open:
            log.warning("deliveries paused", channel=lane.name, to=route.name, code=outcome.code, probe_seconds=pause)
        lane.work.set()

    async def record(self) -> None:
        """Records outcomes, all that are there at once, and frees their slots."""
        while True:
            with tasks.resting():
                await self._any_ended.wait()
            await self._linger()
            while batch := self._ended[:_MOST_RECORDED]:
                for lane in self._lanes.values():
                    await self._record(lane, [one for where, one in batch if where is lane])
                del self._ended[: len(batch)]
                for lane, one in batch:
                    del lane.busy[one.id]
                    lane.freed.set()
                    # What waited for it may be due now.
                    lane.work.set()
                self._settle()

    async def _linger(self) -> None:
        """Returns when no more has ended for a moment, or at least half of what is on its way has."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_RECORD):
                while 2 * len(self._ended) < self.busy:
                    self._any_ended.clear()
                    await self._any_ended.wait()
        self._any_ended.clear()

    async def _record(self, lane: _Running, ended: list[Ended]) -> None:
        if not ended:
            return
        holds = lane.policy.parked_holds
        recorded = await self._retried(lambda connection: outcomes.record(connection, ended, parked_holds=holds))
        for one in ended:
            if one.id not in recorded:
                log.warning("outcome dropped: the lease was lost", delivery_id=str(one.id), attempt=one.number)

    async def tidy(self) -> None:
        """Parks what no attempt of ever had an answer, lets go what waits for nothing any more, cancels what has no
        target.
        """
        loop, looked = asyncio.get_running_loop(), 0.0
        while True:
            for lane in self._lanes.values():
                await self._tidy(lane)
            if loop.time() - looked >= _LOOK_FOR_GONE:
                looked = loop.time()
                for lane in self._lanes.values():
                    await self._cancel_gone(lane)
            await asyncio.sleep(min(self._lease / 2, _LONGEST_PAUSE))

    async def _tidy(self, lane: _Running) -> None:
        policy = lane.policy
        parked = await self._retried(
            lambda connection: outcomes.park_exhausted(connection, lane.name, policy.tries, TRIES_EXHAUSTED)
        )
        for identity in parked:
            log.warning("delivery parked", delivery_id=str(identity), reason="the last attempt had no answer")
        holds = policy.parked_holds
        if await self._retried(lambda connection: outcomes.let_go(connection, lane.name, parked_holds=holds)):
            lane.work.set()

    async def _cancel_gone(self, lane: _Running) -> None:
        known = lane.routes.known()
        if known is None:
            return
        cancelled = await self._retried(
            lambda connection: pending.cancel_gone(
                connection, lane.name, known, patience=_GONE_AFTER, reason=TARGET_GONE
            )
        )
        for identity in cancelled:
            log.warning("delivery cancelled", channel=lane.name, delivery_id=str(identity), reason=TARGET_GONE)

    async def _retried(self, action: Callable[[Connection], Awaitable[_T]]) -> _T:
        return await database.persist(self._pool, action, "deliveries: database not reachable")

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
            await lane.routes.close()
