"""Between threads that wait and the event loop that works for them.

One daemon thread of the process runs the event loop of all channels, for several loops would disturb each other in
gRPC. A call waits for it and, meanwhile, does in its own thread what the loop wants of a blocking cursor store: a store
that keeps to one thread, such as a database connection, just works. Whatever interrupts the waiting thread, Ctrl-C for
instance, cancels the call, and is raised once the call has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

import grpc.aio

from tidings.client import channel as aio_channel
from tidings.client import cursor as aio_cursor
from tidings.client.errors import TidingsError

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

# What a coroutine wants done in the thread that waits for it; None: there will be nothing more.
_Errands = SimpleQueue[Callable[[], None] | None]
_errands: ContextVar[_Errands] = ContextVar("_errands")


class CursorStore(Protocol):
    """As `tidings.client.CursorStore`, but blocking. Its methods are called in the thread that reads the feed."""

    def load(self) -> str | None:
        """The token to go on after; None to begin where the feed's `start` says."""
        ...

    def save(self, token: str) -> None:
        """Keeps a token."""
        ...


class Channel:
    """A channel that any thread may use. Closing it ends the loops over its feeds, and its calls with a
    TidingsError."""

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel]) -> None:
        self._jobs: set[asyncio.Task[Any]] = set()
        self.is_closed = False
        self.aio = self.run(_called(open_channel))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine of this channel returns. It runs in the event loop; do not call this there."""
        if self.is_closed:
            coroutine.close()
            raise TidingsError("the channel is closed")
        try:
            return _Job(self._jobs, lambda: self.is_closed).result_of(coroutine)
        except asyncio.CancelledError:
            if self.is_closed:
                raise TidingsError("the channel was closed") from None
            raise

    def close(self) -> None:
        """Ends everything that goes on over the channel. May be called from any thread, and again."""
        if not self.is_closed:
            self.is_closed = True
            _Job(set()).result_of(self._close())

    async def _close(self) -> None:
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self.aio.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _blocking_connect(connect: Callable[P, grpc.aio.Channel]) -> Callable[P, Channel]:
    @functools.wraps(connect)
    def call(*args: P.args, **kwargs: P.kwargs) -> Channel:
        return Channel(lambda: connect(*args, **kwargs))

    return call


connect = _blocking_connect(aio_channel.connect)


class Client(Generic[A]):
    """Calls a service over a channel, through the client of an event loop that `aio` is."""

    def __init__(self, channel: Channel, aio: A) -> None:
        self.channel = channel
        self.aio = aio


def blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Client[A], P], T]:
    """A method of an async client, which returns when the answer is there."""

    @functools.wraps(method)
    def call(self: Client[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.channel.run(method(self.aio, *args, **kwargs))

    return call


def blocking_iteration(
    method: Callable[Concatenate[A, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client[A], P], Generator[T, None, None]]:
    """A method of an async client that makes an iterator, for a plain loop."""

    @functools.wraps(method)
    def call(self: Client[A], /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return iterated(self.channel, method(self.aio, *args, **kwargs))

    return call


def iterated(channel: Channel, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """The items of an async generator, until it ends or the channel is closed."""
    try:
        while True:
            try:
                item = channel.run(_next(items))
            except StopAsyncIteration:
                return
            except TidingsError:
                if channel.is_closed:
                    return
                raise
            yield item
    finally:
        _end(items)


def _end(items: AsyncGenerator[Any, None]) -> None:
    """Ends an iteration and its call, whoever wants that and wherever."""
    if sys.is_finalizing():
        return
    loop = _loop()
    if _runs_here(loop):
        loop.call_soon(loop.create_task, _closed(items))
    else:
        _Job(set()).result_of(_closed(items))


async def _closed(items: AsyncGenerator[Any, None]) -> None:
    # Who was interrupted twice no longer waits for the end of what it has cancelled, which ends the iteration too.
    with contextlib.suppress(RuntimeError):
        await items.aclose()


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)


async def _called(function: Callable[[], T]) -> T:
    return function()


def stored(cursor: CursorStore | aio_cursor.CursorStore | None) -> aio_cursor.CursorStore | None:
    """A cursor store of either kind, for the client of an event loop."""
    return _Cursor(cursor) if cursor else None


class _Cursor:
    """What the store must do in the reader's thread, it has done there."""

    def __init__(self, store: CursorStore | aio_cursor.CursorStore) -> None:
        self._store = store

    async def load(self) -> str | None:
        return await self._done(self._store.load)

    async def save(self, token: str) -> None:
        await self._done(functools.partial(self._store.save, token))

    async def _done(self, function: Callable[[], T | Awaitable[T]]) -> T:
        answer: Future[T | Awaitable[T]] = Future()
        _errands.get().put(functools.partial(_answer, answer, function))
        said = await asyncio.wrap_future(answer)
        return await said if inspect.isawaitable(said) else said


def _answer(answer: Future[T], function: Callable[[], T]) -> None:
    if answer.set_running_or_notify_cancel():
        try:
            answer.set_result(function())
        except Exception as error:
            answer.set_exception(error)


class _Job:
    """A coroutine that runs in the loop while a thread waits for it, one of those `running`. It is cancelled at once if
    nothing is to be begun.
    """

    def __init__(self, running: set[asyncio.Task[Any]], is_over: Callable[[], bool] = lambda: False) -> None:
        self._running = running
        self._is_over = is_over
        self._errands: _Errands = SimpleQueue()
        self._task: asyncio.Task[Any] | None = None

    def result_of(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for the coroutine's end; whatever interrupts that is raised after the end."""
        loop = _loop()
        if _runs_here(loop):
            coroutine.close()
            raise RuntimeError("a blocking call in the client's event loop would wait for itself")
        try:
            loop.call_soon_threadsafe(self._begin, coroutine)
            self._serve()
        except BaseException:
            loop.call_soon_threadsafe(self._cancel)
            self._serve()
            if self._task is None:
                coroutine.close()
            raise
        assert self._task is not None  # noqa: S101 - it has ended
        result: T = self._task.result()
        return result

    def _serve(self) -> None:
        while (errand := self._errands.get()) is not None:
            errand()

    # In the loop

    def _begin(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        context = copy_context()
        context.run(_errands.set, self._errands)
        self._task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._running.add(self._task)
        self._task.add_done_callback(self._end)
        if self._is_over():
            # The channel may have been closed since the thread looked; what is begun afterwards nobody else cancels.
            self._task.cancel()

    def _cancel(self) -> None:
        if self._task is None or not self._task.cancel():
            # Nothing that would still say so.
            self._errands.put(None)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._errands.put(None)


_starting = threading.Lock()
_started: list[asyncio.AbstractEventLoop] = []


def _loop() -> asyncio.AbstractEventLoop:
    """The loop of the process. It is never closed: gRPC hands what is left of a call to its loop later."""
    with _starting:
        if not _started:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="tidings-client", daemon=True).start()
            # Else gRPC takes its part of the loop down with the last channel, sometimes from under an event.
            loop.call_soon_threadsafe(grpc.aio.init_grpc_aio)
            _started.append(loop)
        return _started[0]


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this thread is the loop's."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
