"""Creates the users of a file: many calls at once, each repeated until the server has answered.

The request_id of a line comes from the file's bytes and the line's number: whoever repeats a line, in this process or
the next, gets the first answer, so that a run after a kill completes and fails no line that was created before. Of
lines that want the same username or email the first wins: the later ones wait for its answer.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tidings.cli.import_rows import Problem, Record, Row
from tidings.cli.import_turns import Turns
from tidings.client import ApiError, Users

# Names request_ids of imports. Another value would make every file look like a new one.
_NAMESPACE = uuid.UUID("6f0c1a52-9f0e-5c53-8f5b-3f2f6f6d2b11")

_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 2.0


@dataclass(slots=True)
class Tally:
    """How far an import is. `created` also counts lines that an earlier run of the same file had created."""

    lines: int = 0
    created: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.lines} lines: {self.created} created, {self.failed} failed"


class StoppedError(Exception):
    """The service was not available for too long."""


def request_id(digest: str, line: int) -> str:
    """The request_id of a line of the file with this digest."""
    return str(uuid.uuid5(_NAMESPACE, f"{digest}:{line}"))


class Import:
    """Sends records. `report` is told each problem as it is known, which may be a little out of order."""

    def __init__(self, users: Users, digest: str, *, retry_for: float, report: Callable[[Problem], None]) -> None:
        self._users = users
        self._digest = digest
        self._retry_for = retry_for
        self._report = report
        self._stopped: ApiError | None = None
        self._turns = Turns()
        self.tally = Tally()

    async def run(self, records: Iterator[Record], concurrency: int) -> None:
        """Reads and sends everything, at most `concurrency` calls at once. Raises StoppedError."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(records))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # reading failed, once for all
        if self._stopped is not None:
            raise StoppedError(self._stopped.message)

    async def _work(self, records: Iterator[Record]) -> None:
        for record in records:
            problem = await self._in_turn(record) if isinstance(record, Row) else record
            if self._stopped is not None:
                return
            self.tally.lines += 1
            if problem is None:
                self.tally.created += 1
            else:
                self.tally.failed += 1
                self._report(problem)

    async def _in_turn(self, row: Row) -> Problem | None:
        async with self._turns.taken(row.user):
            return await self._create(row)

    async def _create(self, row: Row) -> Problem | None:
        loop = asyncio.get_running_loop()
        identity = request_id(self._digest, row.line)
        give_up_at: float | None = None
        backoff = _FIRST_BACKOFF
        while self._stopped is None:
            try:
                await self._users.create(row.user, request_id=identity)
            except ApiError as error:
                if not error.is_temporary:
                    return problem_of(row.line, error)
                give_up_at = give_up_at or loop.time() + self._retry_for
                if loop.time() >= give_up_at:
                    self._stopped = error
                    return None
                wait = (error.retry_after or 0.0) + random.uniform(0, backoff)  # noqa: S311 - no secret
                await asyncio.sleep(min(wait, give_up_at - loop.time()))
                backoff = min(2 * backoff, _LONGEST_BACKOFF)
            else:
                return None
        return None


def problem_of(line: int, error: ApiError) -> Problem:
    """A refused call as the problem of its line."""
    if error.violations:
        first, *others = error.violations
        parts = [first.description, *(f"{other.field}: {other.description}" for other in others)]
        return Problem(line, first.field, error.reason, "; ".join(parts))
    field = error.metadata.get("field", "")
    return Problem(line, field, error.reason, error.message.removeprefix(f"{field}: "))
