"""Runs a module of ours as a process of its own, and again whenever a source changes: for `skaffold dev`.

A process that ends by itself is not started again before the next change: it is most likely a mistake that somebody is
about to mend. SIGTERM and SIGINT end the process, then this one, with its exit code.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from devstack import sources
from servicekit import logs

log = logs.get(__name__)

_POLL = 0.25
_STOP_TIME = 20.0


def _times(root: Path) -> dict[Path, int]:
    times = {}
    for path in sources.modules(root):
        try:
            times[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue  # it is being replaced, which the next look shows
    return times


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(_STOP_TIME)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run(arguments: Sequence[str], root: Path = sources.ROOT) -> int:
    """Runs `python -m ARGUMENTS` until it is told to stop. Returns the exit code of the process."""
    stopping = False

    def stop(_signum: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    seen = _times(root)
    process = _start(arguments)
    told = False
    while not stopping:
        time.sleep(_POLL)
        if process.poll() is not None and not told:
            told = True
            log.warning("ended; waiting for a change of its sources", code=process.returncode)
        now = _times(root)
        if now == seen:
            continue
        # More of the same change may be on its way.
        time.sleep(_POLL)
        if (later := _times(root)) != now:
            continue
        changed = {path for path in now.keys() | seen.keys() if now.get(path) != seen.get(path)}
        log.info("sources have changed", files=sorted(str(path.relative_to(root)) for path in changed))
        _end(process)
        seen, told = later, False
        process = _start(arguments)
    return _end(process)


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches it through us, once.
    return subprocess.Popen([sys.executable, "-m", *arguments], start_new_session=True)  # noqa: S603 - the caller's own
