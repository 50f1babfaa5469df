"""Programs of Prometheus, from the distribution: `apt-get install prometheus prometheus-postgres-exporter`."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import devstack.child


def program(name: str) -> str:
    """Where it is. Without it there is nothing to test, which CI does not accept."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed: apt-get install prometheus prometheus-postgres-exporter"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    return found


@asynccontextmanager
async def running(
    log: Path, command: str, *arguments: str, variables: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """Runs a program for as long as the context lasts, and not longer than this process; its output goes to `log`."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-E", str(Path(devstack.child.__file__)), str(os.getpid()), command, *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
        assert process.returncode is None, log.read_text()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
