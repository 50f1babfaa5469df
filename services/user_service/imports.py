"""One stream of ImportUsers: users are checked as they arrive, decided step by step, and answered in order.

While one step of a stream commits the next is read and checked; a stream holds no more than that and the request that
it is in the middle of. So a client that does not read its answers is soon not read from either.

What always holds:
- A step goes to the writer when the one before it has been decided. So of users that want the same name the first wins,
  also if the stream breaks in between and its client goes on elsewhere.
- An answer counts a prefix of the stream, and what it calls failed has failed for good. What may succeed later ends the
  stream once all that is decided is answered: the client sends the rest again with the same request_ids.
- At a shutdown the step that is with the writer is answered; then the stream ends with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence

from google.rpc import code_pb2

from servicekit.errors import ServiceError, Violation, invalid
from servicekit.streams import Life
from tidings.users.v1 import users_pb2
from user_service import creation, errors, validation
from user_service.domain import Item, Unit
from user_service.lanes import Outcome
from user_service.writer import Writer

_Request = users_pb2.ImportUsersRequest
_Response = users_pb2.ImportUsersResponse

_AHEAD = 500  # users that are checked ahead of their step
_SLICE = 50  # users that are checked before others get their turn on the event loop
_LARGEST_ANSWER = 256 << 10  # bytes of failures after which an answer is sent


class Imports:
    """All imports of this process: how many there may be, half of them of one caller at most, and their common end."""

    def __init__(self, writer: Writer, *, max_imports: int) -> None:
        self._writer = writer
        self._life = Life(
            limit=max_imports,
            limit_per_caller=max(1, max_imports // 2),
            max_age=math.inf,
            reconnect_spread=0,
            wake=self._wake,
        )
        self._running: set[_Import] = set()

    async def drain(self, timeout: float) -> None:
        """Ends every import after its step; returns when they have ended, or after `timeout` seconds."""
        await self._life.drain(timeout)

    def _wake(self) -> None:
        for one in self._running:
            one.wake()

    async def stream(self, requests: AsyncIterator[_Request], unit: Unit) -> AsyncIterator[_Response]:
        """The answers of one import. `unit` says whose it is; its items are the steps'."""
        with self._life.one(unit.caller):
            one = _Import(self._writer, self._life, unit)
            self._running.add(one)
            reader = asyncio.create_task(one.read(requests))
            reader.add_done_callback(lambda _: one.wake())
            try:
                async for answer in one.answers(reader):
                    yield answer
            finally:
                self._running.discard(one)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)


class _Import:
    """How far one stream is."""

    def __init__(self, writer: Writer, life: Life, unit: Unit) -> None:
        self._writer = writer
        self._life = life
        self._unit = unit
        # The users of the next step; those that were found wrong stand among them as their errors.
        self._checked: list[Item | ServiceError] = []
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        # Users that came with requests so far; of requests that are not answered yet the count after each.
        self._received = 0
        self._ends: deque[int] = deque()
        self._processed = self._created = 0

    def wake(self) -> None:
        """Lets a stream that waits look again."""
        self._changed.set()

    async def read(self, requests: AsyncIterator[_Request]) -> None:
        """Checks what arrives. Ends with the client's side of the stream; raises if a request is wrong as such."""
        async for request in requests:
            users = request.users
            if not users:
                raise invalid(Violation("users", "must be at least 1"))
            self._received += len(users)
            self._ends.append(self._received)
            for first in range(0, len(users), _SLICE):
                while len(self._checked) >= _AHEAD:
                    self._taken.clear()
                    await self._taken.wait()
                self._checked += [_checked(user) for user in users[first : first + _SLICE]]
                self._changed.set()
                await asyncio.sleep(0)

    async def answers(self, reader: asyncio.Task[None]) -> AsyncIterator[_Response]:
        """Decides what `reader` has checked, until it has ended or the process drains."""
        while step := await self._step(reader):
            for answer in self._answered(await self._decided(step)):
                yield answer
        if self._checked or not reader.done():
            raise errors.shutting_down()
        await reader

    async def _step(self, reader: asyncio.Task[None]) -> Sequence[Item | ServiceError]:
        """What is to be decided next; nothing at the end."""
        while not (self._checked or reader.done() or self._life.draining):
            self._changed.clear()
            await self._changed.wait()
        if self._life.draining:
            return ()
        limit = self._writer.import_limit
        step, self._checked = self._checked[:limit], self._checked[limit:]
        self._taken.set()
        return step

    async def _decided(self, step: Sequence[Item | ServiceError]) -> Sequence[Outcome]:
        items = tuple([one for one in step if isinstance(one, Item)])
        if not items:
            return [one for one in step if isinstance(one, ServiceError)]
        outcomes = iter(await self._writer.submit_import(self._unit._replace(items=items)))
        return [next(outcomes) if isinstance(one, Item) else one for one in step]

    def _answered(self, outcomes: Sequence[Outcome]) -> Iterator[_Response]:
        """At least one answer for each request that ends here, and one for the rest."""
        answer, size = _Response(), 0
        last = self._processed + len(outcomes)
        for outcome in outcomes:
            if isinstance(outcome, ServiceError):
                answer.failed.append(_failure(self._processed, outcome))
                size += answer.failed[-1].ByteSize()
            else:
                self._created += 1
            self._processed += 1
            is_end = self._ends[0] == self._processed
            if is_end:
                self._ends.popleft()
            if is_end or size > _LARGEST_ANSWER or self._processed == last:
                answer.processed, answer.created = self._processed, self._created
                yield answer
                answer, size = _Response(), 0


def _checked(user: _Request.Item) -> Item | ServiceError:
    violations: validation.Violations = []
    try:
        item = creation.item(user, "", violations)
    except ServiceError as error:
        return error
    return invalid(*violations) if violations else item


def _failure(index: int, error: ServiceError) -> _Response.Failure:
    """What the stream says about a refused user; also a taken name is told by its field."""
    violations = error.violations
    field = error.metadata.get("field")
    if not violations and field is not None:
        violations = (Violation(field, error.message.removeprefix(f"{field}: ")),)
    return _Response.Failure(
        index=index,
        code=code_pb2.Code.Value(error.code),
        message=error.message,
        reason=error.reason,
        violations=[_Response.Failure.Violation(field=one.field, description=one.description) for one in violations],
    )
