"""Creates the users of a file by one import, which goes on until the server has decided every line.

The request_id of a line comes from the file's bytes and the line's number: whoever repeats a line, in this process or
the next, gets the first answer, so that a run after a kill completes and fails no line that was created before. Of
lines that want the same username or email the first wins: the server decides them in the order of the file.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tidings.cli.import_rows import Problem, Record
from tidings.client import ApiError, Users
from tidings.users.v1 import users_pb2

# Names request_ids of imports. Another value would make every file look like a new one.
_NAMESPACE = uuid.UUID("6f0c1a52-9f0e-5c53-8f5b-3f2f6f6d2b11")


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
    """Sends records. `report` is told each problem as it is known: of lines that cannot be read before the server has
    decided those ahead of them.
    """

    def __init__(self, users: Users, digest: str, *, retry_for: float, report: Callable[[Problem], None]) -> None:
        self._users = users
        self._digest = digest
        self._retry_for = retry_for
        self._report = report
        # The lines of the users that are not decided yet.
        self._lines: deque[int] = deque()
        self.tally = Tally()

    async def run(self, records: Iterator[Record]) -> None:
        """Reads and sends everything. Raises StoppedError."""
        decided = 0
        try:
            async for progress in self._users.import_users(self._rows(records), retry_for=self._retry_for):
                for failure in progress.failed:
                    self._fail(problem_of(self._lines[failure.index - decided], failure.error))
                for _ in range(progress.processed - decided):
                    self._lines.popleft()
                self.tally.lines += progress.processed - decided - len(progress.failed)
                self.tally.created = progress.created
                decided = progress.processed
        except ApiError as error:
            if error.is_temporary:
                raise StoppedError(error.message) from error
            raise

    def _rows(self, records: Iterator[Record]) -> Iterator[tuple[users_pb2.User, str]]:
        for record in records:
            if isinstance(record, Problem):
                self._fail(record)
            else:
                self._lines.append(record.line)
                yield record.user, request_id(self._digest, record.line)

    def _fail(self, problem: Problem) -> None:
        self.tally.lines += 1
        self.tally.failed += 1
        self._report(problem)


def problem_of(line: int, error: ApiError) -> Problem:
    """A refused user as the problem of its line."""
    if not error.violations:
        return Problem(line, "", error.reason, error.message)
    first, *others = error.violations
    parts = [first.description, *(f"{other.field}: {other.description}" for other in others)]
    return Problem(line, first.field, error.reason, "; ".join(parts))
