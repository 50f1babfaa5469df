"""Background tasks that are not allowed to die or to hang unseen, and how a waiting task is woken.

A service's loops (writer, tailer, dispatcher ...) run under one `Background`. Such a loop never returns by itself; if
one ends or raises, `failed` is set, health turns to NOT_SERVING and the process exits with 1, so that whoever
supervises the process starts it anew.

A loop that is started with `every` says by `beat()` that it goes round, at least that often; also when it cannot do its
work, for instance for want of a database. What it may wait for as long as others like is `resting`. A loop that says
nothing for `overdue_after` seconds more is overdue, and one that does so for `stuck_after` is stuck. Time in which the
whole process did not run is not held against its loops.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from servicekit import logs, telemetry

log = logs.get(__name__)


class _Beat:
    """When a loop last went round, in the event loop's time."""

    def __init__(self, name: str, every: float, now: float) -> None:
        self.name = name
        self.last = now
        self.is_resting = False
        self._every = every

    def late(self, now: float) -> float:
        """For how many seconds it has owed a beat; not positive if it does not."""
        return 0.0 if self.is_resting else now - self.last - self._every


_beat: ContextVar[_Beat | None] = ContextVar("beat", default=None)


def beat() -> None:
    """Says that the loop that runs here goes round."""
    if (mine := _beat.get()) is not None:
        mine.last = asyncio.get_running_loop().time()


@contextmanager
def resting() -> Iterator[None]:
    """Around what the loop that runs here may wait for without an end."""
    mine = _beat.get()
    if mine is None:
        yield
        return
    mine.is_resting = True
    try:
        yield
    finally:
        mine.is_resting = False
        beat()


class Background:
    """Runs loops until `stop`; remembers the first that died, and knows which do not go round. Times in seconds."""

    def __init__(self, *, overdue_after: float = 30.0, stuck_after: float = 300.0) -> None:
        self._overdue_after = overdue_after
        self._stuck_after = stuck_after
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beats: list[_Beat] = []
        self._stopping = False
        # Whether each loop runs, by its name.
        self.running: dict[str, bool] = {}
        self.failed = asyncio.Event()
        self.failure: str | None = None

    def start(self, loop: Coroutine[Any, Any, None], name: str, *, every: float | None = None) -> asyncio.Task[None]:
        """Starts a loop that must run until `stop`; with `every` it beats so often. Its polls make no spans."""
        made = None if every is None else _Beat(name, every, asyncio.get_running_loop().time())
        if made is not None:
            self._beats.append(made)
        task = asyncio.create_task(_begun(loop, made), name=name)
        self._tasks.add(task)
        self.running[name] = True
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self.running[task.get_name()] = False
        if self._stopping:
            return
        error = None if task.cancelled() else task.exception()
        log.error("background task died", task=task.get_name(), exc_info=error)
        if self.failure is None:
            self.failure = task.get_name()
        self.failed.set()

    @property
    def alive(self) -> bool:
        """Whether every loop still runs."""
        return self.failure is None

    def overdue(self) -> list[str]:
        """The loops that are overdue, by name."""
        return self._late(self._overdue_after)

    def stuck(self) -> list[str]:
        """The loops that have been overdue for so long that only a new process helps."""
        return self._late(self._stuck_after)

    def _late(self, limit: float) -> list[str]:
        now = asyncio.get_running_loop().time()
        return [one.name for one in self._beats if one.late(now) > limit]

    def forgive(self, seconds: float) -> None:
        """No loop could run for so long."""
        for one in self._beats:
            one.last += seconds

    async def until_over(self, told: asyncio.Event, *others: asyncio.Future[Any]) -> None:
        """Returns when the process is told to stop, a loop has died or one of the others has ended; the log says so."""
        waits = [asyncio.create_task(told.wait()), asyncio.create_task(self.failed.wait())]
        await asyncio.wait([*waits, *others], return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        log.info("stopping", reason=f"{self.failure} died" if self.failure else "signal")

    async def stop(self) -> None:
        """Cancels every loop and waits for its clean-up."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _begun(loop: Coroutine[Any, Any, None], made: _Beat | None) -> None:
    telemetry.suppress()
    _beat.set(made)
    await loop


def told_to_stop() -> asyncio.Event:
    """What is set once the process gets SIGTERM or SIGINT."""
    told = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, told.set)
    return told


def wake(waiter: asyncio.Future[None]) -> None:
    """Lets whoever waits for a future go on, if it has not already."""
    if not waiter.done():
        waiter.set_result(None)
