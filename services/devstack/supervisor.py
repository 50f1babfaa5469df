"""Keeps parts running: starts them, says when they are ready, restarts one that dies, with backoff.

A part is anything that can be started and then ends some day (`Running`): a process of ours or Postgres. One task keeps
one part; cancelling the task stops the part and returns when it is gone. A part that dies too often, or that cannot be
started the first time, raises PartFailedError, which ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from devstack.console import Console, pump

DEATHS = 5
WITHIN = 60.0
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 10.0
_READY_POLL = 0.1
_SAY_AGAIN = 30.0
_CHILD = Path(__file__).with_name("child.py")


class PartFailedError(Exception):
    """The run cannot go on without this part."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"{part}: {reason}")
        self.part = part


class StartError(Exception):
    """A part could not be started; the message says why."""


class Running(Protocol):
    """A started part."""

    async def ended(self) -> str:
        """Waits for its death and says how it died."""

    async def stop(self) -> None:
        """Ends it, politely at first; returns when it is gone."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is kept running. `ready` answers None, or why it is not ready yet."""

    name: str
    start: Callable[[], Awaitable[Running]]
    ready: Callable[[], Awaitable[str | None]]


class Deaths:
    """How often a part died lately, and what follows from it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque()

    def delay(self) -> float | None:
        """Notes a death. Returns the wait before the next start, None if that was one too many."""
        now = self._clock()
        self._times.append(now)
        while now - self._times[0] > WITHIN:
            self._times.popleft()
        if len(self._times) >= DEATHS:
            return None
        return min(_FIRST_DELAY * 2.0 ** (len(self._times) - 1), _LONGEST_DELAY)


def outcome(code: int) -> str:
    """A return code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class ChildProcess:
    """A process in a session of its own, so that a Ctrl-C in the terminal reaches the supervisor alone."""

    def __init__(self, process: asyncio.subprocess.Process, output: asyncio.Task[None], stop_time: float) -> None:
        self._process = process
        self._output = output
        self._stop_time = stop_time

    @classmethod
    async def start(
        cls, name: str, command: tuple[str, ...], environment: Mapping[str, str], console: Console, stop_time: float
    ) -> ChildProcess:
        """Starts `command` with `environment` on top of this process's own."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-E", str(_CHILD), str(os.getpid()), *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None  # noqa: S101
        return cls(process, asyncio.create_task(pump(console, name, process.stdout)), stop_time)

    async def exit_code(self) -> int:
        """Waits for the end, and for the last line of output."""
        code = await self._process.wait()
        # A grandchild may hold the pipe open; the last lines of the process itself are there already.
        await asyncio.wait([self._output], timeout=1.0)
        self._output.cancel()
        return code

    async def ended(self) -> str:
        return outcome(await self.exit_code())

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(self._stop_time):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        await self.exit_code()


async def _follow_readiness(
    part: Part, console: Console, started: float, late_after: float, became_ready: Callable[[], None]
) -> None:
    say_at = started + late_after
    while (reason := await part.ready()) is not None:
        now = time.monotonic()
        if now >= say_at:
            console.say(f"{part.name} is late: not ready after {now - started:.0f} s ({reason})")
            say_at = now + _SAY_AGAIN
        await asyncio.sleep(_READY_POLL)
    console.say(f"{part.name} is ready after {time.monotonic() - started:.1f} s")
    became_ready()


async def _live(part: Part, console: Console, late_after: float, ready: Callable[[], None]) -> str:
    """One life of a part, from its start to its death."""
    started = time.monotonic()
    running = await part.start()
    readiness = asyncio.create_task(_follow_readiness(part, console, started, late_after, ready))
    try:
        return await running.ended()
    finally:
        readiness.cancel()
        await running.stop()


async def keep(part: Part, console: Console, late_after: float, ready: Callable[[], None]) -> None:
    """Runs a part for ever. `ready` is called each time it has become ready."""
    deaths = Deaths()
    first = True
    while True:
        console.say(f"starting {part.name}")
        try:
            how = await _live(part, console, late_after, ready)
        except StartError as error:
            if first:
                raise PartFailedError(part.name, f"cannot be started: {error}") from error
            how = str(error)
        first = False
        delay = deaths.delay()
        if delay is None:
            raise PartFailedError(part.name, f"died {DEATHS} times within {WITHIN:.0f} s, the last time with {how}")
        console.say(f"{part.name} died ({how}); restarting in {delay:g} s")
        await asyncio.sleep(delay)


@contextlib.asynccontextmanager
async def kept(
    *parts: Part, console: Console, late_after: float, failed: asyncio.Future[None]
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Keeps parts running until it is left; then all are gone. Gives a wait until all have become ready once.

    A part's failure is put into `failed`.
    """

    def note(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not failed.done():
            failed.set_exception(error)

    ready = {part.name: asyncio.Event() for part in parts}

    async def all_ready() -> None:
        for event in ready.values():
            await event.wait()

    tasks = [asyncio.create_task(keep(part, console, late_after, ready[part.name].set)) for part in parts]
    for task in tasks:
        task.add_done_callback(note)
    try:
        yield all_ready
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        console.say(f"stopped {' and '.join(ready)}")
