"""Background tasks that are not allowed to die unseen, and how a waiting task is woken.

A service's loops (writer, tailer, dispatcher ...) run under one `Background`. Such a loop never returns by itself; if
one ends or raises, `failed` is set, health turns to NOT_SERVING and the process exits with 1, so that whoever
supervises the process starts it anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from servicekit import logs, telemetry

log = logs.get(__name__)


class Background:
    """Runs loops until `stop`; remembers the first that died."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self.failed = asyncio.Event()
        self.failure: str | None = None

    def start(self, loop: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a loop that must run until `stop`. Its polls make no spans."""
        task = asyncio.create_task(_quiet(loop), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
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

    async def stop(self) -> None:
        """Cancels every loop and waits for its clean-up."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _quiet(loop: Coroutine[Any, Any, None]) -> None:
    telemetry.suppress()
    await loop


def wake(waiter: asyncio.Future[None]) -> None:
    """Lets whoever waits for a future go on, if it has not already."""
    if not waiter.done():
        waiter.set_result(None)
