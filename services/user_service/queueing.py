"""The writer's queue: calls and imports wait in a lane each until it is time for their next batch.

What always holds: a call waits for one batch of imports at most, however many there are, and an import for one batch of
calls. While calls come batches of imports are small.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from servicekit.tasks import wake
from user_service import metrics
from user_service.domain import Unit
from user_service.lanes import Lane, Outcome, Waiting

# Users in one batch of imports: the more, the less a user costs, and the longer calls wait that come meanwhile.
_IMPORT_LIMIT = 500
_IMPORT_LIMIT_BESIDE_CALLS = 100
_LULL = 0.002  # seconds without an arrival that end a linger
# A batch is taken when so much of the units in flight waits for it: while Postgres commits these, the others arrive.
_SHARE = 0.6
# What was in flight once is expected to come back, by so much less with each batch.
_FADING = 0.97


class Queue:
    """Both lanes, and when a batch is taken from them. Use from one event loop; one task gathers and takes."""

    def __init__(self, batch_limit: int, linger: float) -> None:
        """`linger` is how long a batch waits for more calls at most, in seconds."""
        self.calls = Lane(metrics.CALLS, batch_limit)
        self.imports = Lane(metrics.IMPORTS, _IMPORT_LIMIT)
        # Set while nobody waits for a commit.
        self.idle = asyncio.Event()
        self.idle.set()
        self._linger = linger
        self._arrived = asyncio.Event()
        # Calls in flight: those of a batch when it is answered, and those that wait meanwhile.
        self._in_flight = 1.0
        self._enough = 1
        self._gathering: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self.calls) + len(self.imports)

    def __iter__(self) -> Iterator[Waiting]:
        yield from self.calls
        yield from self.imports

    def add_call(self, unit: Unit) -> asyncio.Future[list[Outcome]]:
        """Queues a unit that someone waits for."""
        outcomes = self.calls.add(unit)
        self._added(is_enough=len(self.calls) >= self._enough)
        return outcomes

    def add_import(self, unit: Unit) -> asyncio.Future[list[Outcome]]:
        """Queues a step of an import."""
        outcomes = self.imports.add(unit)
        self._added(is_enough=True)
        return outcomes

    def _added(self, *, is_enough: bool) -> None:
        self.idle.clear()
        self._arrived.set()
        if is_enough and self._gathering is not None:
            wake(self._gathering)

    async def gather(self) -> None:
        """Waits for the first unit, then lingers until enough of the calls in flight are here, or no other arrives for
        a while: a commit costs much, a unit little.

        A lone caller does not wait, but for some lulls after a crowd. While an import waits nobody lingers: calls
        gather during its commit.
        """
        calls, imports = self.calls, self.imports
        if not calls and not imports:
            self.idle.set()
            self._arrived.clear()
            await self._arrived.wait()
        self._enough = min(calls.limit, int(self._in_flight * _SHARE))
        loop = asyncio.get_running_loop()
        until = loop.time() + self._linger
        waiting = 0
        while not imports and waiting < len(calls) < self._enough and loop.time() < until:
            waiting = len(calls)
            self._gathering = loop.create_future()
            lull = loop.call_later(_LULL, wake, self._gathering)
            await self._gathering
            lull.cancel()
        self._gathering = None

    def take_calls(self) -> list[Waiting]:
        """The next batch of calls; empty if none waits."""
        return self.calls.take()

    def answered(self, calls: list[Waiting]) -> None:
        """Notes that a batch was answered: its callers are likely to call again."""
        self._in_flight = max(self._in_flight * _FADING, len(calls) + len(self.calls))

    def take_imports(self, *, beside_calls: bool) -> list[Waiting]:
        """The next batch of imports; empty if none waits."""
        self.imports.limit = _IMPORT_LIMIT_BESIDE_CALLS if beside_calls else _IMPORT_LIMIT
        return self.imports.take()
