"""A program that is forked is the program: its arguments, environment, output, exit code, signals, and death."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.harness import Databases, Services, programs, until
from tests.harness.process import clean_environment

_EXEC = {"PYTHONUTF8": "1"}
_NOBODY = "127.0.0.1:1"


def _command(pid: int) -> list[str]:
    words: list[str] = psutil.Process(pid).cmdline()
    return words


@pytest.mark.parametrize("variables", [{}, _EXEC], ids=["forked", "executed"])
async def test_arguments_environment_output_and_exit_code(variables: dict[str, str], tmp_path: Path) -> None:
    environment = {**clean_environment(), **variables}

    async def run(*arguments: str, **more: str) -> tuple[int, str, str]:
        process = await programs.start(
            "user_service", *arguments, environment=environment | more, directory=tmp_path, apart=True
        )
        output, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()

    code, output, errors = await run("--help")
    assert (code, errors) == (0, "")
    assert output.startswith("usage: python -m user_service ")
    assert (await run("dance"))[0] == 2
    code, output, errors = await run("serve", TIDINGS_USERS_MAX_BATCH="many")
    assert (code, output) == (2, "")
    assert "TIDINGS_USERS_MAX_BATCH" in errors
    # What one was told is not told the next.
    assert "TIDINGS_USERS_DATABASE_URL" in (await run("serve"))[2]


async def test_who_is_forked_and_who_is_executed(
    databases: Databases, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await databases.users()
    first = await services.users(made).start()
    second = await services.users(made).start()
    assert _command(first.pid) == _command(second.pid)
    assert "nursery.py" in " ".join(_command(first.pid))
    assert os.getsid(first.pid) == first.pid
    services.environment |= _EXEC
    assert _command((await services.users(made).start()).pid)[1:] == ["-m", "user_service", "serve"]
    services.environment.clear()
    monkeypatch.setenv("TIDINGS_TEST_FORK", "0")
    assert _command((await services.users(made).start()).pid)[1:] == ["-m", "user_service", "serve"]


async def test_signals_and_ends_are_told(services: Services, databases: Databases) -> None:
    service = services.users(await databases.users())
    for signum, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0), (signal.SIGINT, 0)):
        await service.start()
        service.send(signum)
        assert await service.wait() == code
        assert not psutil.pid_exists(service.pid)


_OTHER = """
import asyncio
from tests.harness import programs
from tests.harness.process import clean_environment

async def main():
    environment = {**clean_environment(), "TIDINGS_NOTIFICATIONS_LISTEN": "127.0.0.1:0"}
    environment["TIDINGS_NOTIFICATIONS_DATABASE_URL"] = "postgresql:///nothing?host=/nowhere"
    process = await programs.start("notification_service", "serve", environment=environment)
    await process.stdout.readline()
    print(process.pid, flush=True)
    await process.wait()

asyncio.run(main())
"""


async def test_nothing_outlives_who_started_it() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _OTHER, stdout=asyncio.subprocess.PIPE, env={**clean_environment(), "PYTHONPATH": "."}
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    await parent.wait()
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


async def test_a_nursery_that_is_killed_is_replaced() -> None:
    environment = clean_environment()

    async def code() -> int:
        process = await programs.start("migrations", "--help", environment=environment)
        await process.communicate()
        assert process.returncode is not None
        return process.returncode

    assert await code() == 0
    nursery = programs._nurseries[asyncio.get_running_loop()]["migrations"]
    nursery.process.kill()
    await until(lambda: nursery.is_gone)
    assert await code() == 0
