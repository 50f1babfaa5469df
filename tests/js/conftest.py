"""The client as a process, with what npm installs for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.client.conftest import ScriptedUsers
from tests.harness import ServiceProcess, Services

_HERE = Path(__file__).parent
_LOCK = _HERE / "package-lock.json"
_INSTALLED = _HERE / "node_modules" / ".installed-by"
_OLDEST_NODE = 18

# The client with its arguments, not started yet.
Client = Callable[..., ServiceProcess]


def _missing() -> str | None:
    """What this machine lacks."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < _OLDEST_NODE:
        return f"node is {version}, older than v{_OLDEST_NODE}"
    return None


def _install() -> None:
    """Brings node_modules to what the lock names, once for all workers and sessions."""
    with _LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = lock.read()
        if _INSTALLED.is_file() and _INSTALLED.read_text() == wanted:
            return
        done = subprocess.run(
            ["npm", "ci"],
            cwd=_HERE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"npm ci: {done.stdout}"
        _INSTALLED.write_text(wanted)


@pytest.fixture(scope="session")
def _installed() -> None:
    missing = _missing()
    if missing is not None:
        # CI installs them; there nothing may go untested.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    _install()


@pytest.fixture
def client(_installed: None, services: Services) -> Client:
    """Makes clients, which end with the test."""
    return lambda *arguments: services.process("tests.js", *arguments, environment={})


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedUsers]:
    """A listening server without scripts."""
    made = ScriptedUsers()  # type: ignore[abstract] # methods without a script answer UNIMPLEMENTED
    await made.start()
    yield made
    await made.stop()
