"""Routes: whom a lane may ask now, how many at once, and who is asked next.

A route is one mail provider or one webhook endpoint, with its breaker, its rate and its share of the lane's slots. A
lane of providers has a choice: the first in the operator's order that may be asked, and for a delivery whose last
attempt ended in an outage another one, if there is any. A lane of targets has none: each delivery goes to its own, and
what one target may not have, or is slow to take, leaves room for the others.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from notification_service.breaker import Breaker, Patience
from notification_service.channels import Channel, Outcome
from notification_service.limits import Bucket

# No target of several gets more than its part of the slots, and that is never less than one of so many.
_MOST_PARTS = 4


@dataclass(slots=True)
class Route:
    """Who is asked. `name` is for logs, metrics and the list of attempts."""

    name: str
    channel: Channel
    breaker: Breaker
    most: int
    bucket: Bucket | None = None
    busy: int = 0

    def room(self, now: float) -> int:
        """How many more may go now."""
        room = self.most - self.busy
        if (allowed := self.breaker.room(now)) is not None:
            room = min(room, allowed)
        if self.bucket is not None:
            room = min(room, self.bucket.room(now))
        return max(room, 0)

    def wait(self, now: float) -> float:
        """Seconds until there may be more room, as far as time brings it."""
        return max(self.breaker.wait(now), self.bucket.wait() if self.bucket else 0.0)

    def begun(self, now: float, bound: float) -> None:
        """One goes now, and has ended after `bound` seconds."""
        self.busy += 1
        self.breaker.begun(now, bound)
        if self.bucket is not None:
            self.bucket.take(1)

    def left(self) -> None:
        """One that had begun has ended."""
        self.busy -= 1

    def ended(self, now: float, outcome: Outcome) -> bool:
        """Learns from an outcome. Returns whether the breaker has opened or closed."""
        if outcome.outage:
            return self.breaker.failed(now, outcome.retry_after)
        return self.breaker.answered()


@dataclass(frozen=True, slots=True)
class Plan:
    """What may be leased now: so many in all, or of each target. If nothing, something may be after `wait` seconds."""

    most: int
    targets: Mapping[str, int] | None = None
    wait: float = math.inf


class Asked(Protocol):
    """What a route is chosen for."""

    @property
    def target(self) -> str:
        """Where it goes."""
        ...

    @property
    def failed_provider(self) -> str:
        """Whose outage ended the attempt before; empty if none did."""
        ...


class Routes(Protocol):
    """The routes of a lane."""

    def plan(self, free: int, now: float) -> Plan:
        """What may be leased into so many free slots."""
        ...

    def choose(self, asked: Asked, now: float) -> Route | None:
        """The route of one delivery; None if there is none, or no room on it any more."""
        ...

    def alternative(self, route: Route, now: float) -> bool:
        """Whether another route could take what this one could not."""
        ...

    def of(self, target: str) -> Sequence[Route]:
        """All that a delivery to a target could go by."""
        ...

    def known(self) -> Collection[str] | None:
        """The targets that there are, also those that are not asked now; None if any will do."""
        ...

    def standing(self) -> Sequence[Route]:
        """All routes, for who looks at them."""
        ...

    async def close(self) -> None:
        """Gives back what the channels hold."""
        ...


def _wait(routes: Sequence[Route], now: float) -> float:
    return min((route.wait(now) for route in routes), default=math.inf)


@dataclass(frozen=True, slots=True)
class Providers:
    """Mail providers in the operator's order."""

    routes: Sequence[Route]

    def plan(self, free: int, now: float) -> Plan:
        """See Routes."""
        most = min(free, sum(route.room(now) for route in self.routes))
        return Plan(most, wait=math.inf if most else _wait(self.routes, now))

    def choose(self, asked: Asked, now: float) -> Route | None:
        """See Routes."""
        able = [route for route in self.routes if route.room(now)]
        others = [route for route in able if route.name != asked.failed_provider]
        return next(iter(others or able), None)

    def alternative(self, route: Route, now: float) -> bool:
        """See Routes."""
        return any(one is not route and one.room(now) for one in self.routes)

    def of(self, target: str) -> Sequence[Route]:
        """See Routes."""
        return self.routes

    def known(self) -> Collection[str] | None:
        """See Routes."""
        return None

    def standing(self) -> Sequence[Route]:
        """See Routes."""
        return self.routes

    async def close(self) -> None:
        """See Routes."""
        await asyncio.gather(*(route.channel.close() for route in self.routes))


@dataclass(frozen=True, slots=True)
class Target:
    """A target that may be asked: its name, and calls a second, 0 for any number."""

    name: str
    rate: float = 0.0


@dataclass(slots=True)
class Targets:
    """Routes to what `targets` names, by target, each asked for every time: they change while the process runs. What
    `paused` names is there, too, but not asked.
    """

    channel: Channel
    targets: Callable[[], Mapping[str, Target]]
    paused: Callable[[], Collection[str]]
    slots: int
    patience: Patience
    _routes: dict[str, tuple[Target, Route]] = field(default_factory=dict)

    def _current(self) -> dict[str, Route]:
        wanted = self.targets()
        share = math.ceil(self.slots / min(max(len(wanted), 1), _MOST_PARTS))
        kept: dict[str, tuple[Target, Route]] = {}
        for key, target in wanted.items():
            known = self._routes.get(key)
            if known is None or known[0] != target:
                bucket = Bucket(target.rate) if target.rate else None
                # Another rate or name is no other destination: what is known of it stays.
                breaker, busy = (known[1].breaker, known[1].busy) if known else (Breaker(self.patience), 0)
                known = (target, Route(target.name, self.channel, breaker, share, bucket, busy))
            known[1].most = share
            kept[key] = known
        self._routes = kept
        return {key: route for key, (_, route) in kept.items()}

    def plan(self, free: int, now: float) -> Plan:
        """See Routes."""
        routes = self._current()
        rooms = {key: min(free, route.room(now)) for key, route in routes.items()}
        targets = {key: room for key, room in rooms.items() if room}
        most = min(free, sum(targets.values()))
        shut = [route for key, route in routes.items() if not rooms[key]]
        return Plan(most, targets, _wait(shut, now))

    def choose(self, asked: Asked, now: float) -> Route | None:
        """See Routes."""
        known = self._routes.get(asked.target)
        return known[1] if known and known[1].room(now) else None

    def alternative(self, route: Route, now: float) -> bool:
        """See Routes."""
        return False

    def of(self, target: str) -> Sequence[Route]:
        """See Routes."""
        route = self._current().get(target)
        return [route] if route else []

    def known(self) -> Collection[str] | None:
        """See Routes."""
        return {*self.targets(), *self.paused()}

    def standing(self) -> Sequence[Route]:
        """See Routes."""
        return list(self._current().values())

    async def close(self) -> None:
        """See Routes."""
        await self.channel.close()
