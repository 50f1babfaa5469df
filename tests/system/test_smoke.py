"""`tidings smoke-test` against the whole system, and against one that does not do its work."""

from __future__ import annotations

import asyncio
import os
import sys

from tests.system.conftest import System
from tests.users.calls import replay


async def _smoke_test(system: System, *arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidings.cli", "smoke-test", *arguments,
        env=os.environ
        | {
            "TIDINGS_CLIENT_USERS_ADDRESS": system.users.address,
            "TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS": system.notifications.address,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_change_goes_all_the_way(system: System) -> None:
    code, out, err = await _smoke_test(system)
    assert (code, err) == (0, "")
    created, deleted = await replay(system.stub)
    assert out.splitlines() == [
        f"created {created.user.username}",
        "the feed has it at position 1",
        "the notification service has made of it: welcome",
        f"deleted {created.user.username}",
    ]
    assert deleted.user.id == created.user.id


async def test_a_system_that_does_not_notify_is_found_out_and_left_tidy(system: System) -> None:
    await system.notifications.kill()
    code, out, err = await _smoke_test(system, "--timeout", "2")
    assert code == 6
    assert "the feed has it at position 1" in out
    assert err.startswith("error: ")
    assert "notification service" in err
    assert [event.user.HasField("delete_time") for event in await replay(system.stub)] == [False, True]
