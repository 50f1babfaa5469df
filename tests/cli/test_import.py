"""`users import`: bad lines are named, good ones created once, whatever happens to the service or to the command."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import System, Tidings, launch
from tests.harness import Database, Services, until
from tidings.cli.import_rows import Lines, Problem, read_csv
from tidings.cli.import_run import Import, StoppedError, request_id
from tidings.client import Users, connect

HEADER = b"username,email,display_name\n"
FILE = (
    HEADER
    + b'ada,ada@example.com,"Ada\nLovelace"\n'  # lines 2 and 3
    + b"bob,bob.example.com,\n"  # line 4
    + b"joe,joe@example.com\n"  # line 5
    + b"ada,ada2@example.com,\n"  # line 6
    + b"zoe,zoe@example.com,\xff\n"  # line 7
    + b"kim,kim@example.com,\n"
)


def people(count: int) -> bytes:
    """A file of so many users."""
    return HEADER + b"".join(b"u%d,u%d@example.com,\n" % (number, number) for number in range(count))


async def run(system: System, data: bytes, *, retry_for: float = 5.0) -> tuple[Import, list[Problem]]:
    """An import in this process."""
    found: list[Problem] = []
    async with connect(system.address) as channel:
        running = Import(Users(channel), "digest", retry_for=retry_for, report=found.append)
        await running.run(read_csv(Lines(io.BytesIO(data))))
    return running, found


class TestCommand:
    async def test_bad_lines_are_named(self, system: System, tidings: Tidings, tmp_path: Path) -> None:
        (tmp_path / "people.csv").write_bytes(FILE)
        ran = await tidings("users", "import", "people.csv")
        assert ran.code == 7
        assert ran.out == "6 lines: 2 created, 4 failed\n"
        assert sorted(ran.err.splitlines()) == [
            "line 4: user.email: must have an @",
            "line 5: has 2 columns, the header has 3",
            "line 6: user.username: ada is taken",
            "line 7: user.display_name: is not UTF-8",
        ]
        assert {user.username: user.display_name for user in system.directory.users.values()} == {
            "ada": "Ada\nLovelace",
            "kim": "",
        }

        again = await tidings("users", "import", "-", "--format", "csv", "--json", stdin=FILE)
        assert again.code == 7
        assert again.err == ""
        *failures, summary = map(json.loads, again.out.splitlines())
        assert {(one["line"], one["field"], one["reason"]) for one in failures} == {
            (4, "user.email", "INVALID_FIELD"),
            (5, "", "WRONG_COLUMN_COUNT"),
            (6, "user.username", "USERNAME_TAKEN"),
            (7, "user.display_name", "BAD_UTF8"),
        }
        assert summary == {"lines": 6, "created": 2, "failed": 4}
        assert len(system.directory.events) == 2

    async def test_json_lines(self, system: System, tidings: Tidings, tmp_path: Path) -> None:
        lines = [{"username": f"u{number}", "email": f"u{number}@example.com"} for number in range(200)]
        (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, lines)))
        ran = await tidings("users", "import", "people.jsonl")
        assert (ran.code, ran.out, ran.err) == (0, "200 lines: 200 created, 0 failed\n", "")

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("people.csv", b"username,email,nick\n", "error: line 1: 'nick' is not a column"),
            ("people.txt", b"", "Error: Invalid value for --format: say what the file holds"),
            ("missing.csv", None, "error: missing.csv: No such file or directory"),
        ],
    )
    async def test_a_file_that_cannot_be_read_is_refused(
        self, tidings: Tidings, tmp_path: Path, name: str, data: bytes | None, message: str
    ) -> None:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        ran = await tidings("users", "import", name)
        assert ran.code == 2
        assert ran.out == ""
        assert ran.err.splitlines()[-1].startswith(message)

    async def test_a_killed_import_completes_when_run_again(
        self, system: System, tidings: Tidings, tmp_path: Path
    ) -> None:
        (tmp_path / "people.csv").write_bytes(people(1000))
        system.directory.delay = 0.001
        process = await launch(system, tmp_path, "users", "import", "people.csv")
        await until(lambda: len(system.directory.events) >= 100)
        process.kill()
        await process.wait()
        assert len(system.directory.events) < 1000
        system.directory.delay = 0.0
        ran = await tidings("users", "import", "people.csv")
        assert (ran.code, ran.out) == (0, "1000 lines: 1000 created, 0 failed\n")
        assert len(system.directory.events) == 1000

    async def test_the_service_is_away_for_too_long(self, system: System, tidings: Tidings, tmp_path: Path) -> None:
        (tmp_path / "people.csv").write_bytes(people(100))
        system.directory.unavailable_after = 10
        ran = await tidings("users", "import", "people.csv", "--retry-for", "0")
        assert ran.code == 6
        assert "stopped: 10 lines: 10 created, 0 failed" in ran.err
        assert "out of service; run the same command again to go on" in ran.err

    async def test_ctrl_c(self, system: System, tmp_path: Path) -> None:
        (tmp_path / "people.csv").write_bytes(people(100))
        system.directory.unavailable_after = 10
        process = await launch(system, tmp_path, "users", "import", "people.csv")
        await until(lambda: system.directory.imports >= 2)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert process.returncode == 130
        assert b"Traceback" not in err


async def test_kill_9_of_the_service_and_then_of_the_command(
    services: Services, users_database: Database, tmp_path: Path
) -> None:
    service = await services.users(users_database).start()
    bad = b"ada,nowhere,\nu7,else@example.com,\n"
    (tmp_path / "people.csv").write_bytes(people(6000) + bad)

    async def has_stored(count: int) -> bool:
        [[stored]] = await users_database.fetch("SELECT count(*) FROM users")
        return int(str(stored)) > count

    process = await launch(service, tmp_path, "users", "import", "people.csv")
    await until(lambda: has_stored(500))
    await service.kill()
    await service.restart()
    await until(lambda: has_stored(2000))
    process.kill()
    await process.wait()
    assert not await has_stored(5999)
    process = await launch(service, tmp_path, "users", "import", "people.csv")
    out, err = await process.communicate()
    assert process.returncode == 7
    assert out == b"6002 lines: 6000 created, 2 failed\n"
    assert [line.partition(b":")[0] for line in err.splitlines()] == [b"line 6002", b"line 6003"]
    assert await users_database.fetch("SELECT count(*), (SELECT head_position FROM feed) FROM users") == [(6000, 6000)]


class TestRun:
    async def test_an_outage_is_waited_for(self, system: System) -> None:
        system.directory.unavailable_after = 50

        async def comes_back() -> None:
            await until(lambda: system.directory.imports >= 3)
            system.directory.unavailable_after = None

        back = asyncio.create_task(comes_back())
        running, found = await run(system, people(200))
        await back
        assert str(running.tally) == "200 lines: 200 created, 0 failed"
        assert found == []
        assert len(system.directory.events) == 200

    async def test_failures_are_told_by_their_lines(self, system: System) -> None:
        good = people(1200).removeprefix(HEADER)
        data = HEADER + b"broken\n" + good + b"u7,other@example.com,\n" + b"ada,nowhere,\nbroken\n"
        for _ in range(2):
            running, found = await run(system, data)
            assert sorted((one.line, one.field, one.reason) for one in found) == [
                (2, "", "WRONG_COLUMN_COUNT"),
                (1203, "user.username", "USERNAME_TAKEN"),
                (1204, "user.email", "INVALID_FIELD"),
                (1205, "", "WRONG_COLUMN_COUNT"),
            ]
            assert str(running.tally) == "1204 lines: 1200 created, 4 failed"

    async def test_what_is_decided_is_told_when_the_service_is_given_up(self, system: System) -> None:
        system.directory.unavailable_after = 3
        found: list[Problem] = []
        async with connect(system.address) as channel:
            running = Import(Users(channel), "digest", retry_for=0.0, report=found.append)
            with pytest.raises(StoppedError):
                await running.run(
                    read_csv(Lines(io.BytesIO(HEADER + b"ada,nowhere,\n" + people(9).removeprefix(HEADER))))
                )
        assert str(running.tally) == "4 lines: 3 created, 1 failed"
        assert [one.line for one in found] == [2]

    def test_request_ids_name_the_file_and_the_line(self) -> None:
        ids = {request_id(digest, line) for digest in ("a", "b") for line in (1, 2)}
        assert len(ids) == 4
        assert request_id("a", 1) == request_id("a", 1) == "e9e4ff42-6ac5-57b1-9443-a7022469dfb2"
