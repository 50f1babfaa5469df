"""An import as its client sees it: users go out in order, over as many connections as it takes.

What always holds:
- A user is kept until the server has decided it. A bounded number are; the source is read no further than that.
- A connection that breaks is followed by another, which begins with the first undecided user. Each user keeps its
  request_id, so that one that was created without our hearing of it is counted and not created again.
- A full message goes at once; one that is not full when nothing else is under way. So a source that trickles delays no
  user, and makes few messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import grpc
import grpc.aio

from tidings.client.connection import Connection, End
from tidings.client.errors import ApiError, Violation
from tidings.client.unary import new_request_id
from tidings.users.v1 import users_pb2

log = logging.getLogger("tidings.client")

# A user with its request_id; None is a new one.
Imported = tuple[users_pb2.User, str | None]
_Item = users_pb2.ImportUsersRequest.Item
_Call = grpc.aio.StreamStreamCall[users_pb2.ImportUsersRequest, users_pb2.ImportUsersResponse]

# What is under way at most, and what a message holds at most (one user is always taken).
_MOST_USERS, _MOST_BYTES = 2000, 8 << 20
_MESSAGE_USERS, _MESSAGE_BYTES = 500, 1 << 20

# Seconds without an answer to what was sent, after which a connection is dead; more than a server takes to find out
# about a commit whose answer got lost.
_SILENCE = 60.0

_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 2.0

_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class ImportFailure:
    """A user that was refused: its index, counted from the source's first user, and why."""

    index: int
    error: ApiError


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is.

    `processed` users are decided, in the order of the source; `created` of them exist, made by this import or by an
    earlier one with the same request_ids. `failed` are those refused since the progress before.
    """

    processed: int
    created: int
    failed: tuple[ImportFailure, ...]


class Import:
    """The users between a source and the server. `call` opens a stream; `retry_for` is in seconds."""

    def __init__(
        self, source: AsyncIterable[Imported] | Iterable[Imported], call: Callable[[], _Call], *, retry_for: float
    ) -> None:
        self._source = source
        self._call = call
        self._patience = _Patience(retry_for)
        # What is undecided, in order. The first so many of it were given to the connection.
        self._users: deque[_Item] = deque()
        self._bytes = 0
        self._sent = 0
        self._write_failed = False
        self._is_read = False
        self._processed = self._created = 0
        self._changed = asyncio.Event()

    async def run(self) -> AsyncGenerator[ImportProgress, None]:
        """Progress after progress, until every user is decided.

        Raises what the source raises, once all that came before is decided; and the ApiError that repetition cannot
        cure, or has not cured.
        """
        reading = asyncio.create_task(self._read())
        try:
            await self._until(lambda: self._users or self._is_read)
            while not self._is_over:
                async with contextlib.aclosing(self._follow()) as passed:
                    async for progress in passed:
                        yield progress
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    @property
    def _is_over(self) -> bool:
        return self._is_read and not self._users

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _read(self) -> None:
        try:
            async for user, request_id in _each(self._source):
                item = _Item(user=user, request_id=request_id or new_request_id())
                self._users.append(item)
                self._bytes += item.ByteSize()
                self._changed.set()
                await self._until(lambda: len(self._users) < _MOST_USERS and self._bytes < _MOST_BYTES)
        finally:
            self._is_read = True
            self._changed.set()

    # One connection

    async def _follow(self) -> AsyncGenerator[ImportProgress, None]:
        """What one connection brings. After one that broke it waits for the time of the next."""
        processed, created = self._processed, self._created
        self._sent = 0
        self._write_failed = False
        call = self._call()
        connection = Connection(call, _SILENCE, refusal=self._refusal)
        sending = asyncio.create_task(self._send(call))
        sending.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                # Read only while an answer is due: the watchdog looks at reads.
                await self._until(lambda: self._sent or sending.done())
                answer = await connection.read()
                if isinstance(answer, End):
                    break
                self._advance(processed + answer.processed, created + answer.created)
                self._patience.renew()
                failed = tuple([_failure(processed, one) for one in answer.failed])
                yield ImportProgress(self._processed, self._created, failed)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await connection.close()
        if not self._is_over:
            await self._patience.wait(answer)

    async def _send(self, call: _Call) -> None:
        while True:
            await self._until(self._is_due)
            users = self._next_message()
            if not users:
                await call.done_writing()
                return
            self._sent += len(users)
            self._changed.set()
            try:
                await call.write(users_pb2.ImportUsersRequest(users=users))
            except asyncio.InvalidStateError:
                return  # the call has ended; whoever reads it learns why
            except grpc.aio.AioRpcError:
                self._write_failed = True
                return

    def _refusal(self, error: ApiError) -> ApiError | None:
        # If a call ends during a write, grpc.aio may say INTERNAL in place of what it ended with.
        if error.is_temporary or (self._write_failed and error.code is grpc.StatusCode.INTERNAL):
            return None
        return error

    def _is_due(self) -> bool:
        unsent = len(self._users) - self._sent
        return self._is_read or unsent >= _MESSAGE_USERS or (unsent > 0 and not self._sent)

    def _next_message(self) -> list[_Item]:
        users: list[_Item] = []
        size = 0
        for item in islice(self._users, self._sent, self._sent + _MESSAGE_USERS):
            size += item.ByteSize()
            if users and size > _MESSAGE_BYTES:
                break
            users.append(item)
        return users

    def _advance(self, processed: int, created: int) -> None:
        decided = processed - self._processed
        if not 0 <= decided <= self._sent:
            raise ApiError(grpc.StatusCode.INTERNAL, "the server has decided users that were not sent")
        for _ in range(decided):
            self._bytes -= self._users.popleft().ByteSize()
        self._sent -= decided
        self._processed, self._created = processed, created
        self._changed.set()


class _Patience:
    """How long to go on without progress, and how fast. Times are in seconds."""

    def __init__(self, retry_for: float) -> None:
        self._retry_for = retry_for
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._give_up_at: float | None = None
        self._backoff = _FIRST_BACKOFF

    async def wait(self, end: End) -> None:
        """Waits until it is time for another try. Raises the ApiError if it has been long enough."""
        now = asyncio.get_running_loop().time()
        if self._give_up_at is None:
            self._give_up_at = now + self._retry_for
        if now >= self._give_up_at:
            raise end.error or ApiError(grpc.StatusCode.UNAVAILABLE, end.reason)
        jittered = (end.wait or 0.0) + random.uniform(0, self._backoff)  # noqa: S311 - no secret
        delay = min(jittered, self._give_up_at - now)
        self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
        log.warning("import: %s; connecting again in %.1f s", end.reason, delay)
        await asyncio.sleep(delay)


async def _each(source: AsyncIterable[Imported] | Iterable[Imported]) -> AsyncGenerator[Imported, None]:
    if isinstance(source, AsyncIterable):
        async for one in source:
            yield one
    else:
        for one in source:
            yield one


def _failure(base: int, failure: users_pb2.ImportUsersResponse.Failure) -> ImportFailure:
    error = ApiError(
        _CODES.get(failure.code, grpc.StatusCode.UNKNOWN),
        failure.message,
        reason=failure.reason,
        violations=[Violation(one.field, one.description) for one in failure.violations],
    )
    return ImportFailure(base + failure.index, error)
