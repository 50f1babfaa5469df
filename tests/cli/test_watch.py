"""`users watch` and `notifications watch`: what is printed is remembered, and nothing is printed twice."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.cli.conftest import NOW, Ran, System, Tidings, launch
from tests.harness import PostgresServer, ServiceProcess, Services
from tidings.client import User, Users, connect, shard_of
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--user", "ada"], "--user: 'ada' is no id of a user"),
        (["--label", "team"], "--label: 'team' is not KEY=VALUE"),
        (["--label", "=engines"], "--label: '=engines' is not KEY=VALUE"),
        (["--label", "team=a", "--label", "team=b"], "--label: 'team' has two values"),
        (["--type", "renamed"], "'renamed' is not one of 'created', 'updated', 'deleted', 'undeleted'"),
        (["--changed-field", "name"], "'name' is not one of 'username', 'email'"),
        (["--shard", "1"], "--shard: '1' is not INDEX/COUNT such as 0/4"),
        (["--shard", "-1/4"], "--shard: '-1/4' is not INDEX/COUNT such as 0/4"),
        (["--shard", "4/4"], "--shard: '4/4': the index must be below the count"),
        (["--shard", "0/0"], "--shard: '0/0': the index must be below the count"),
        (["--shard", "0/65537"], "the count at most 65536"),
        (["--snapshot", "--from", "now"], "--snapshot: a snapshot begins now"),
        (["--snapshot", "--since", "2026-05-04T12:00:00Z"], "--snapshot: a snapshot begins now"),
        (["--snapshot", "--type", "created"], "--snapshot: a snapshot has no changes to choose from"),
        (["--snapshot", "--changed-field", "email"], "--snapshot: a snapshot has no changes to choose from"),
    ],
)
async def test_wrong_values_are_refused_before_anything_is_asked(
    system: System, tidings: Tidings, options: list[str], message: str
) -> None:
    ran = await tidings("users", "watch", *options)
    assert (ran.code, ran.out) == (2, "")
    assert message in " ".join(ran.err.split())
    assert system.directory.watched == []


@pytest.fixture(scope="module")
async def service(postgres: PostgresServer) -> AsyncIterator[ServiceProcess]:
    """A user service."""
    database, services = await postgres.users_database(), Services()
    yield await services.users(database).start()
    await services.stop()
    await postgres.drop(database)


class TestSelections:
    """What is selected of a user service that is real."""

    async def _watch(self, service: ServiceProcess, directory: Path, *options: str) -> Ran:
        process = await launch(service, directory, "users", "watch", *options)
        out, err = await process.communicate()
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())

    async def _changed(self, users: Users, team: str) -> tuple[list[User], int]:
        """Users a to d of a team: a gets another address, b another team, c is deleted. And the position before."""
        before = (await users.feed()).head_position
        made = [
            await users.create(User(username=f"{name}-{team}", email=f"{name}@{team}.example", labels={"team": team}))
            for name in "abcd"
        ]
        await users.update(User(id=made[0].id, email=f"z@{team}.example"), ["email"])
        await users.update(User(id=made[1].id, labels={"team": "other"}), ["labels"])
        await users.delete(made[2].id)
        return made, before

    async def test_a_snapshot_and_who_leaves_its_filter(self, service: ServiceProcess, tmp_path: Path) -> None:
        options = ["--snapshot", "--label", "team=looms", "--cursor-file", "cursor"]
        async with connect(service.address) as channel:
            users = Users(channel)
            [a, *_, d], _ = await self._changed(users, "looms")
            # A batch at a time: the marks are printed once, whatever the limit cuts.
            ran = [await self._watch(service, tmp_path, *options, "--json", "--limit", "1") for _ in range(2)]
            assert [(one.code, one.err) for one in ran] == [(0, "")] * 2
            head = (await users.feed()).head_position
            await users.update(User(id=d.id, labels={"team": "tables"}), ["labels"])
        lines = [json.loads(line) for one in ran for line in one.out.splitlines()]
        assert lines[0] == {"snapshot_begin": {"position": str(head)}}
        assert [(line["type"], line["position"], line["user"]["id"]) for line in lines[1:]] == [
            ("SNAPSHOT", str(head), user.id) for user in (a, d)
        ]
        table = await self._watch(service, tmp_path, *options, "--limit", "1")
        [end, change] = table.out.splitlines()
        assert end == f"{head:>9}  snapshot ends"
        assert change.startswith(f"{head + 1:>9}  20")
        assert change.split("Z  ")[1] == f"{'UPDATED':<9}  {'d-looms':<24}  labels (left the filter)"
        # The cursor is of that filter.
        other = await self._watch(service, tmp_path, "--label", "team=tables", "--cursor-file", "cursor")
        assert other.code == 3
        assert other.err == (
            "error: --cursor-file: cursor is of a watch of other users or changes; remove it to begin anew\n"
        )

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (lambda made: ["--user", made[0].id, "--user", made[2].id.upper()], [1, 3, 5, 7]),
            (lambda made: ["--label", f"team={made[0].labels['team']}", "--type", "updated"], [5, 6]),
            (lambda made: ["--type", "CREATED", "--type", "deleted"], [1, 2, 3, 4, 7]),
            (lambda made: ["--changed-field", "email", "--changed-field", "labels", "--type", "updated"], [5, 6]),
        ],
        ids=["users", "label", "types", "fields"],
    )
    async def test_of_changes(
        self,
        service: ServiceProcess,
        tmp_path: Path,
        request: pytest.FixtureRequest,
        options: Callable[[list[User]], list[str]],
        expected: list[int],
    ) -> None:
        async with connect(service.address) as channel:
            users = Users(channel)
            made, before = await self._changed(users, f"team-{request.node.callspec.id}")
        start = ["--since", made[0].create_time.ToJsonString(), "--json", "--limit", str(len(expected))]
        ran = await self._watch(service, tmp_path, *start, *options(made))
        assert (ran.code, ran.err) == (0, "")
        assert [position - before for position in positions(ran.out)] == expected

    async def test_a_shard(self, service: ServiceProcess, tmp_path: Path) -> None:
        async with connect(service.address) as channel:
            everybody = [user.id async for user in Users(channel).list()]
            if len(everybody) < 20:
                new = [User(username=f"shard-{one}", email=f"shard-{one}@example.com") for one in range(20)]
                everybody += [user.id for user in await Users(channel).create_batch(new)]
        mine = sorted(user_id for user_id in everybody if shard_of(user_id, 2) == 1)
        ran = await self._watch(service, tmp_path, "--snapshot", "--shard", "1/2", "--json", "--limit", str(len(mine)))
        assert [json.loads(line)["user"]["id"] for line in ran.out.splitlines()[1:]] == mine
