"""Parts are restarted with backoff, the log says so, and a part that dies too often ends the run."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from devstack import supervisor
from devstack.console import Console
from devstack.supervisor import ChildProcess, Deaths, Part, PartFailedError, StartError, keep
from tests.harness import until


def _child(
    console: Console, code: str, *, name: str = "users", stop_time: float = 5.0, ready: str | None = None
) -> Part:
    async def start() -> ChildProcess:
        return await ChildProcess.start("users", (sys.executable, "-S", "-c", code), {}, console, stop_time)

    async def is_ready() -> str | None:
        return ready

    return Part("users", start, is_ready)


@contextlib.asynccontextmanager
async def _kept(part: Part, console: Console, late_after: float = 60.0) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(keep(part, console, late_after, lambda: None))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _pids(output: io.StringIO) -> list[int]:
    return [int(line.rpartition("pid=")[2]) for line in output.getvalue().splitlines() if "pid=" in line]


def _is_gone(pid: int) -> bool:
    # A sandbox's kernel may list a process for a moment after it was waited for.
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


SLEEPER = "import os, time; print(f'pid={os.getpid()}', flush=True); time.sleep(600)"


def test_backoff_grows_and_the_fifth_death_within_a_minute_is_one_too_many() -> None:
    now = 0.0
    deaths = Deaths(lambda: now)
    assert [deaths.delay() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, None]
    deaths = Deaths(lambda: now)
    for _ in range(50):
        assert deaths.delay() is not None
        now += 16.0


async def test_a_killed_part_is_restarted_and_the_log_says_so() -> None:
    output = io.StringIO()
    async with _kept(_child(Console(output), SLEEPER), Console(output)):
        await until(lambda: len(_pids(output)) == 1)
        os.kill(_pids(output)[0], signal.SIGKILL)
        await until(lambda: len(_pids(output)) == 2)
    assert "users died (killed by SIGKILL); restarting in 0.5 s" in output.getvalue()
    await until(lambda: all(_is_gone(pid) for pid in _pids(output)))


async def test_a_part_that_always_dies_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_DELAY", 0.01)
    output = io.StringIO()
    console = Console(output)
    with pytest.raises(PartFailedError, match=r"users: died 5 times within 60 s, the last time with exit code 3"):
        await keep(_child(console, "raise SystemExit(3)"), console, 60.0, lambda: None)
    assert output.getvalue().count("restarting in") == 4


async def test_a_part_that_cannot_be_started_ends_the_run() -> None:
    async def start() -> ChildProcess:
        raise StartError("no such file")

    part = _child(Console(io.StringIO()), "")
    with pytest.raises(PartFailedError, match="postgres: cannot be started: no such file"):
        await keep(Part("postgres", start, part.ready), Console(io.StringIO()), 60.0, lambda: None)


async def test_a_part_that_is_late_is_said_to_be() -> None:
    output = io.StringIO()
    part = _child(Console(output), SLEEPER, ready="NOT_SERVING")
    async with _kept(part, Console(output), late_after=0.2):
        await until(lambda: "users is late: not ready after 0 s (NOT_SERVING)" in output.getvalue())


async def test_a_part_that_ignores_sigterm_is_killed() -> None:
    output = io.StringIO()
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"
    async with _kept(_child(Console(output), code, stop_time=0.3), Console(output)):
        await until(lambda: _pids(output) != [])
    await until(lambda: _is_gone(_pids(output)[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
async def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from devstack.console import Console
from devstack.supervisor import ChildProcess
async def main():
    await ChildProcess.start("users", (sys.executable, "-S", "-c", {SLEEPER!r}), {{}}, Console(), 5.0)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int((await parent.stdout.readline()).rpartition(b"pid=")[2])
    assert psutil.pid_exists(child)
    parent.kill()
    await parent.wait()
    await until(lambda: _is_gone(child))


async def test_output_is_prefixed_line_by_line_however_long() -> None:
    output = io.StringIO()
    code = "import sys; sys.stdout.write('x' * 200_000 + '\\n' + 'last')"
    child = await ChildProcess.start("users", (sys.executable, "-S", "-c", code), {}, Console(output), 5.0)
    assert await child.exit_code() == 0
    lines = output.getvalue().splitlines()
    assert "".join(line.rpartition(" ")[2] for line in lines) == "x" * 200_000 + "last"
    assert all(line.startswith("users ") for line in lines)


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], coloured: bool) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = io.StringIO()
    Console(output).line("users", "text")
    assert ("\x1b[" in output.getvalue()) is coloured
