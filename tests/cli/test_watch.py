"""`users watch` and `notifications watch`: what is printed is remembered, and nothing is printed twice."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

from tests.cli.conftest import NOW, System, Tidings, launch
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2


async def store(system: System, count: int) -> None:
    """Creates users."""
    for _ in range(count):
        number = len(system.directory.events)
        user = users_pb2.User(id=f"id-{number}", username=f"user-{number}")
        await system.directory.store(user, users_pb2.UserEvent.CREATED)


def positions(lines: str) -> list[int]:
    """The positions of JSON lines."""
    return [int(json.loads(line)["position"]) for line in lines.splitlines()]


async def test_limits_and_cursors_leave_nothing_out(system: System, tidings: Tidings) -> None:
    await store(system, 2500)
    seen = []
    for limit in (1, 1500, 999):
        ran = await tidings(
            "users", "watch", "--from", "earliest", "--cursor-file", "cursor", "--json", "--limit", str(limit)
        )
        assert (ran.code, ran.err) == (0, "")
        seen.append(positions(ran.out))
    assert [len(some) for some in seen] == [1, 1500, 999]
    assert [position for some in seen for position in some] == list(range(1, 2501))


async def test_a_group_cut_by_the_limit_comes_again(system: System, tidings: Tidings) -> None:
    await store(system, 3)
    system.directory.grouped = True
    for _ in range(2):
        ran = await tidings("users", "watch", "--from", "earliest", "--cursor-file", "cursor", "--json", "--limit", "2")
        assert positions(ran.out) == [1, 2]


async def test_ctrl_c_keeps_the_place_of_a_watch_that_has_seen_nothing(
    system: System, tidings: Tidings, tmp_path: Path
) -> None:
    await store(system, 3)
    process = await launch(system, tmp_path, "users", "watch", "--cursor-file", "cursor")
    while not (tmp_path / "cursor").exists():
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 130
    await store(system, 1)
    ran = await tidings("users", "watch", "--cursor-file", "cursor", "--limit", "1")
    assert ran.out == "        4  2023-11-14 22:13:20Z  CREATED    user-3\n"


async def test_ctrl_c_keeps_what_was_printed(system: System, tmp_path: Path) -> None:
    await store(system, 5)
    process = await launch(system, tmp_path, "users", "watch", "--from", "earliest", "--cursor-file", "cursor")
    assert process.stdout is not None
    for _ in range(5):
        await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert (tmp_path / "cursor").read_text() == "token-5\n"


async def test_a_closed_pipe_ends_quietly(system: System, tmp_path: Path) -> None:
    await store(system, 2)
    process = await launch(system, tmp_path, "users", "watch", "--from", "earliest", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    assert await process.stdout.readline()
    process.stdout._transport.close()  # type: ignore[attr-defined]
    await asyncio.sleep(0.05)
    await store(system, 2)
    assert await process.stderr.read() == b""
    assert await process.wait() == 0


async def test_a_file_that_is_no_cursor(tidings: Tidings, tmp_path: Path) -> None:
    (tmp_path / "cursor").write_text("nonsense")
    ran = await tidings("users", "watch", "--cursor-file", "cursor")
    assert ran.code == 3
    assert ran.err == "error: --cursor-file: cursor holds no token of this service; remove it to begin anew\n"
    ran = await tidings("users", "watch", "--cursor-file", "no/cursor")
    assert ran.code == 2


async def test_notifications(system: System, tidings: Tidings) -> None:
    system.inbox.notifications = [
        notifications_pb2.Notification(position=7, category="security", subject="Your email", create_time=NOW)
    ]
    ran = await tidings("notifications", "watch", "--limit", "1", "--from", "earliest")
    assert (ran.code, ran.out) == (0, "        7  2023-11-14 22:13:20Z  security      Your email\n")


async def test_since_is_a_time_and_excludes_from(system: System, tidings: Tidings) -> None:
    both = await tidings("users", "watch", "--from", "now", "--since", "2026-05-04T12:00:00Z")
    assert both.code == 2
    assert "not both" in both.err
    assert "no time such as" in (await tidings("users", "watch", "--since", "yesterday")).err
    await store(system, 3)
    ran = await tidings("users", "watch", "--since", "2026-05-04T14:00:00+02:00", "--json", "--limit", "3")
    assert positions(ran.out) == [1, 2, 3]
    assert system.directory.watched[-1].since.ToJsonString() == "2026-05-04T12:00:00Z"
