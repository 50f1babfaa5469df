"""`tidings.client.sync`: programs without an event loop, each a process, against services."""

from __future__ import annotations

import asyncio
import inspect
import sys

import pytest

from tests.client.plain import PROGRAMS
from tests.harness import Databases, ServiceProcess, Services
from tidings import client
from tidings.client import sync


async def _runs(name: str, *addresses: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-W", "error", "-m", "tests.client.plain", name, *addresses,
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


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_program_with_plain_threads(real: ServiceProcess, name: str) -> None:
    await _runs(name, real.address)


async def test_the_notification_service_from_plain_threads(
    real: ServiceProcess, databases: Databases, services: Services
) -> None:
    service = await services.notifications(await databases.notifications(), real).start()
    await _runs("notified", real.address, service.address)


@pytest.mark.parametrize(
    "name", [one for one in client.__all__ if hasattr(sync, one) and one not in ("connect", "CursorStore")]
)
def test_no_method_is_missing(name: str) -> None:
    def methods(kind: type) -> set[str]:
        return {method for method, _ in inspect.getmembers(kind, inspect.isfunction) if not method.startswith("_")}

    # Its source would be read in a thread of its own.
    assert methods(getattr(client, name)) - methods(getattr(sync, name)) <= {"import_users"}


def test_no_client_is_missing() -> None:
    takes_a_channel = {
        name
        for name in client.__all__
        if inspect.isclass(kind := getattr(client, name)) and "channel" in inspect.getfullargspec(kind.__init__).args
    }
    assert takes_a_channel <= set(sync.__all__)
