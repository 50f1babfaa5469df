"""Units that wait for their commit, first come, first served.

Of a lane whole batches are taken. What always holds: units that share a user, a name, an address or a request_id are
never in one batch and leave in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from servicekit.errors import ServiceError
from user_service import metrics, tracing
from user_service.domain import Unit

# What became of an item: its serialized answer, or why it was refused (only if its unit is independent).
Outcome = bytes | ServiceError


@dataclass(slots=True, eq=False)
class Waiting:
    """A unit, and whoever waits for its outcomes; a future that is done already has nobody who waits."""

    unit: Unit
    keys: set[object]
    exclusive: bool
    outcomes: asyncio.Future[list[Outcome]]
    since: float
    wait: tracing.Wait | None = None

    def answer(self, outcomes: list[Outcome]) -> None:
        """Tells whoever still waits what became of the items."""
        if not self.outcomes.done():
            self.outcomes.set_result(outcomes)

    def refuse(self, error: BaseException) -> None:
        """Tells whoever still waits why there is no outcome."""
        if not self.outcomes.done():
            self.outcomes.set_exception(error)


def waiting(unit: Unit, since: float | None = None) -> Waiting:
    """A unit that waits from now on, or has waited since then, in the loop's time."""
    loop = asyncio.get_running_loop()
    outcomes: asyncio.Future[list[Outcome]] = loop.create_future()
    made = Waiting(unit, unit.keys(), unit.exclusive, outcomes, loop.time() if since is None else since)
    if (wait := tracing.waiting()) is not None:
        made.wait = wait
        outcomes.add_done_callback(lambda _: wait.span.end())
    return made


class Lane:
    """A queue. `limit` is how many items a batch has at most, except that one unit is always taken whole."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        # Items of the units that wait.
        self.items = 0
        # The same by caller, where callers are known.
        self.items_of: Counter[str] = Counter()
        self._queue: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._queue)

    def add(self, unit: Unit) -> asyncio.Future[list[Outcome]]:
        """Queues a unit."""
        added = waiting(unit)
        self._queue.append(added)
        self._count(unit, len(unit.items))
        return added.outcomes

    def _count(self, unit: Unit, more: int) -> None:
        self.items += more
        if unit.caller:
            self.items_of[unit.caller] += more
            if not self.items_of[unit.caller]:
                del self.items_of[unit.caller]

    def take(self) -> list[Waiting]:
        """The next batch; empty if nobody waits."""
        batch: list[Waiting] = []
        later: list[Waiting] = []
        seen: set[object] = set()
        items = 0
        while self._queue:
            first = self._queue[0]
            size = len(first.unit.items)
            if batch and (items + size > self.limit or first.exclusive):
                break
            self._queue.popleft()
            if first.outcomes.done():  # the caller is gone
                self._count(first.unit, -size)
                continue
            if seen.isdisjoint(first.keys):
                batch.append(first)
                items += size
                self._count(first.unit, -size)
            else:
                later.append(first)
            # Also of a unit that waits: none may overtake it.
            seen |= first.keys
            if first.exclusive:
                break
        self._queue.extendleft(reversed(later))
        if batch:
            metrics.taken(self.name, items, asyncio.get_running_loop().time() - batch[0].since)
        return batch
