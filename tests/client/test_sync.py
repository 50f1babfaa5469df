"""`tidings.client.sync`: programs without an event loop, each a process, against a user service."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.client.plain import PROGRAMS
from tests.harness import ServiceProcess


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_program_with_plain_threads(real: ServiceProcess, name: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-W", "error", "-m", "tests.client.plain", name, real.address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        pytest.fail(f"{name} does not end")
    assert process.returncode == 0, output.decode()
    # What debug mode says of steps that took long is about the machine.
    said = [line for line in output.decode().splitlines() if not line.startswith("Executing <")]
    assert said == ["done"]
