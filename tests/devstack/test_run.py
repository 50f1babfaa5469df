"""`make run` as a user meets it: what it refuses, what it starts, what survives, and what is left behind (nothing)."""

from __future__ import annotations

import fcntl
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from typer.testing import CliRunner

from devstack.parts import ask_health, ask_http, ask_smtp
from tests.harness import ServiceProcess, free_port, until
from tests.harness.metrics import parsed, read_url
from tidings.cli.app import app
from tidings.client import Users, connect


class Run(ServiceProcess):
    """`python -m devstack run` on a directory and ports of its own."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.users_port, self.notifications_port, self.smtp_port = free_port(), free_port(), free_port()
        self.console_port = free_port()
        self.data_dir = data_dir
        ports = {
            "TIDINGS_DEVSTACK_DATA_DIR": str(data_dir),
            "TIDINGS_DEVSTACK_USERS_PORT": str(self.users_port),
            "TIDINGS_DEVSTACK_NOTIFICATIONS_PORT": str(self.notifications_port),
            "TIDINGS_DEVSTACK_SMTP_PORT": str(self.smtp_port),
            "TIDINGS_DEVSTACK_USERS_METRICS_PORT": str(free_port()),
            "TIDINGS_DEVSTACK_NOTIFICATIONS_METRICS_PORT": str(free_port()),
            "TIDINGS_DEVSTACK_CONSOLE_PORT": str(self.console_port),
            "TIDINGS_DEVSTACK_OTLP_PORT": str(free_port()),
            "TIDINGS_DEVSTACK_PAGES_PORT": str(free_port()),
        }
        super().__init__("devstack", "run", environment={**ports, **environment})

    async def line(self, text: str, count: int = 1, timeout: float = 60.0) -> None:
        """Waits until that many lines hold `text`."""

        def seen() -> bool:
            assert self.alive or self.said(text) >= count, self.tail()
            return self.said(text) >= count

        await until(seen, timeout, f"{text!r} {count} times in\n{self.tail()}")

    def said(self, text: str) -> int:
        """How many lines hold `text`."""
        return sum(text in line for line in self.lines)

    @property
    def postgres_pid(self) -> int:
        """The postmaster's process id."""
        return int((self.data_dir / "postgres" / "postmaster.pid").read_text().split()[0])

    def processes(self) -> dict[str, psutil.Process]:
        """The supervisor's children by their module."""
        found = {}
        for process in psutil.Process(self.pid).children():
            words = process.cmdline()
            if "-m" in words:
                found[words[words.index("-m") + 1]] = process
        return found

    def postgres_url(self) -> str:
        """The superuser's URL of the users database, as it was printed."""
        [url] = {match[0] for line in self.lines if (match := re.search(r"postgresql://postgres@\S+", line))}
        return str(url)


@pytest.fixture
async def run(short_dir: Path) -> AsyncIterator[Run]:
    started = Run(short_dir / "data")
    yield started
    if started.alive:
        await started.stop()


def _refused(data_dir: Path, **environment: str) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-m", "devstack", "run"],
        env={"PATH": "/usr/bin:/bin", "TIDINGS_DEVSTACK_DATA_DIR": str(data_dir), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("TIDINGS_DEVSTACK_USERS_PORT", "user-service"),
        ("TIDINGS_DEVSTACK_NOTIFICATIONS_PORT", "notification-service"),
        ("TIDINGS_DEVSTACK_SMTP_PORT", "mail-catcher"),
        ("TIDINGS_DEVSTACK_USERS_METRICS_PORT", "user-service"),
        ("TIDINGS_DEVSTACK_NOTIFICATIONS_METRICS_PORT", "notification-service"),
        ("TIDINGS_DEVSTACK_CONSOLE_PORT", "console"),
        ("TIDINGS_DEVSTACK_OTLP_PORT", "console"),
        ("TIDINGS_DEVSTACK_PAGES_PORT", "notification-service"),
    ],
)
def test_a_taken_port_is_refused_before_anything_starts(short_dir: Path, setting: str, part: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = _refused(short_dir, **{setting: str(port)})
    assert code == 1
    assert f"error: port {port} on 127.0.0.1 for the {part} is taken; choose another with {setting}=PORT" in output
    assert not (short_dir / "postgres").exists()


def test_one_port_for_two_parts_is_refused(short_dir: Path) -> None:
    code, output = _refused(short_dir, TIDINGS_DEVSTACK_USERS_PORT="4001", TIDINGS_DEVSTACK_SMTP_PORT="4001")
    assert code == 1
    assert "TIDINGS_DEVSTACK_SMTP_PORT and TIDINGS_DEVSTACK_USERS_PORT both say 4001" in output


def test_a_data_directory_in_use_is_refused(short_dir: Path) -> None:
    with (short_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        code, output = _refused(short_dir)
    assert code == 1
    assert "is in use by another run (pid 4711)" in output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIDINGS_DEVSTACK_SMTP_PORT", "mail"),
        ("TIDINGS_DEVSTACK_SMPT_PORT", "2525"),
        ("TIDINGS_DEVSTACK_HOST", "0.0.0.0"),
    ],
)
def test_wrong_settings_are_refused_with_one_line_each(short_dir: Path, name: str, value: str) -> None:
    code, output = _refused(short_dir, **{name: value})
    assert code == 2
    assert [line for line in output.splitlines() if line.startswith(f"error: {name}: ")] == output.splitlines()


async def test_a_postgres_that_cannot_start_ends_the_run(run: Run) -> None:
    cluster = run.data_dir / "postgres"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("18\n")
    await run.launch()
    assert await run.wait() == 1
    assert run.said("ended, because postgres: cannot be started") == 1


async def test_a_failed_migration_ends_the_run(run: Run, short_dir: Path) -> None:
    failing = short_dir / "stand-in" / "migrations"
    failing.mkdir(parents=True)
    (failing / "__init__.py").touch()
    (failing / "__main__.py").write_text("raise SystemExit('no such revision')")
    run = Run(run.data_dir, PYTHONPATH=str(failing.parent), PYTHONSAFEPATH="1")
    await run.launch()
    assert await run.wait() == 1
    assert run.said("no such revision") == 1
    assert run.said("ended, because migrations: exit code 1") == 1
    assert not (run.data_dir / "postgres" / "postmaster.pid").exists()


async def _follow_a_link(run: Run) -> None:
    """The link that `tidings mail show` prints works."""
    async with connect(f"127.0.0.1:{run.users_port}") as channel:
        await Users(channel).create({"username": "ada", "email": "ada@example.com"})
    mail_dir = run.data_dir / "mail"
    await until(lambda: list(mail_dir.glob("*.eml")), what="a mail is caught")
    shown = CliRunner().invoke(app, ["mail", "show", "latest", "--dir", str(mail_dir)])
    found = re.search(r"^Unsubscribe +(http://\S+)$", shown.output, re.MULTILINE)
    assert found is not None, shown.output
    async with aiohttp.ClientSession() as session:
        async with session.post(found[1], data={"List-Unsubscribe": "One-Click"}) as answer:
            assert answer.status == 200
        async with session.get(found[1]) as answer:
            assert "is switched off" in await answer.text()


async def test_the_whole_system(run: Run) -> None:
    await run.launch()
    await run.line("Tidings is ready")
    assert await ask_health(f"127.0.0.1:{run.users_port}") is None
    assert await ask_health(f"127.0.0.1:{run.notifications_port}") is None
    assert await ask_smtp("127.0.0.1", run.smtp_port) is None
    served = [parsed(await read_url(url)) for line in run.lines for url in re.findall(r"http://\S+/metrics", line)]
    assert [one.value("tidings_ready") for one in served] == [1, 1]
    assert await ask_http("127.0.0.1", run.console_port) is None
    [said] = [at for at, line in enumerate(run.lines) if "Tidings is ready" in line]
    assert run.lines[said + 1].split() == ["console", f"http://127.0.0.1:{run.console_port}/"]
    await _follow_a_link(run)
    link_keys = (run.data_dir / "links.keys").read_bytes()
    assert stat.S_IMODE((run.data_dir / "links.keys").stat().st_mode) == 0o600
    first = run.processes()
    assert sorted(first) == ["console", "devstack", "notification_service", "user_service"]
    with psycopg.connect(run.postgres_url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS n")

    # A killed part comes back, Postgres too, and the services find it again by themselves.
    first["notification_service"].kill()
    await run.line("notification-service died (killed by SIGKILL); restarting in 0.5 s")
    await run.line("notification-service is ready", count=2)
    psutil.Process(run.postgres_pid).kill()
    await run.line("postgres died (its process is gone); restarting")
    await run.line("postgres is ready", count=2)

    async def both_ready() -> bool:
        ports = (run.users_port, run.notifications_port)
        return all([await ask_health(f"127.0.0.1:{port}") is None for port in ports])

    await until(both_ready, 30.0, "both services are ready again")

    # A killed supervisor takes its processes with it; Postgres stays and is adopted.
    left = run.processes()
    postgres_pid = run.postgres_pid
    await run.kill(signal.SIGKILL)
    await until(lambda: not any(process.is_running() for process in left.values()), what="no process is left")
    run.lines.clear()
    await run.launch()
    await run.line(f"postgres was left over from a killed run and is adopted (pid {postgres_pid})")
    await run.line("Tidings is ready")

    # Ctrl-C stops everything in order, the data survives, and the next start finds it.
    left = run.processes()
    assert await run.kill(signal.SIGINT) == 0
    assert not any(process.is_running() for process in left.values())
    await until(lambda: not psutil.pid_exists(postgres_pid), 2.0)
    stops = [line.rpartition("| ")[2] for line in run.lines if "| stopped " in line]
    assert stops == [
        "stopped user-service and notification-service",
        "stopped console",
        "stopped mail-catcher",
        "stopped postgres",
    ]
    run.lines.clear()
    await run.launch()
    await run.line("Tidings is ready")
    with psycopg.connect(run.postgres_url()) as connection:
        assert connection.execute("SELECT n FROM kept").fetchall() == [(42,)]
    assert (run.data_dir / "links.keys").read_bytes() == link_keys
    assert await run.kill(signal.SIGTERM) == 0
