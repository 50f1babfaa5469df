"""One real Postgres for a test session, and a fresh migrated database whenever a test wants one.

Migrations run once per session and service, into a template; a test's database is a copy of it. The server is the one
that `make run` starts, with more connections and with a log that says who did what.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from psycopg.sql import SQL, Identifier

from devstack import postgres
from servicekit import database
from tests.harness import programs
from tests.harness.process import clean_environment

Kind = Literal["users", "notifications"]

FLAGS = {
    **postgres.FLAGS,
    "max_connections": "300",
    # Tests crash the server, never the machine: what was written is in the kernel's hands.
    "fsync": "off",
    "full_page_writes": "off",
    # It may be in memory.
    "max_wal_size": "256MB",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
    "deadlock_timeout": "200ms",
    # Statements are not logged; errors are, with the statement that made them.
    "log_min_messages": "warning",
    "log_min_error_statement": "error",
}

# Where files are in memory. A database is some hundred files: to make one for each test costs ten times more on disk.
_MEMORY = Path("/dev/shm")
_ENOUGH = 4 << 30

# Ends the server when pytest is gone, however it went.
_WATCHDOG = """
import os, signal, shutil, sys
sys.stdin.read()
try:
    # Its pid is another one after a restart.
    with open(sys.argv[1] + "/postgres/postmaster.pid") as file:
        os.kill(int(file.readline()), signal.SIGQUIT)
except (OSError, ValueError):
    pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@dataclass(frozen=True, slots=True)
class Database:
    """A database of one test. `url` is its owner's (what a service gets), `admin_url` the superuser's."""

    name: str
    url: str
    admin_url: str

    async def connect(self) -> database.Connection:
        """A connection as superuser, in autocommit mode."""
        return await database.connect(self.admin_url, "test")

    async def fetch(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """All rows of a query, as superuser."""
        async with await self.connect() as connection:
            cursor = await connection.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []


class PostgresServer:
    """The session's server."""

    def __init__(self, server: postgres.Postgres, directory: Path, watchdog: subprocess.Popen[bytes]) -> None:
        self._directory = directory
        self._watchdog = watchdog
        self._locks: defaultdict[Kind, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._migrated: set[Kind] = set()
        self.server = server

    @classmethod
    async def start(cls, parent: Path | None = None) -> PostgresServer:
        """Starts a server on a directory of its own: below `parent`, else in memory if there is room."""
        # Not below pytest's base directory, whose permissions other sessions reset.
        directory = Path(tempfile.mkdtemp(prefix="tidings-test-", dir=parent or _memory()))
        server = await postgres.start(directory / "postgres", FLAGS)
        watchdog = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _WATCHDOG, str(directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return cls(server, directory, watchdog)

    async def stop(self) -> None:
        """Stops the server and removes everything."""
        await self.server.stop()
        self._watchdog.kill()
        self._watchdog.wait()
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def crash(self) -> None:
        """Stops the server in immediate mode, which is a crash to it, and starts it again."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGQUIT)
        await self.server.ended()
        self.server = await postgres.start(self._directory / "postgres", FLAGS)

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self.server.pid

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.server.log_path

    def log_mark(self) -> int:
        """A place in the server's log, for `log_since`."""
        return self.log_path.stat().st_size

    def log_since(self, mark: int) -> str:
        """What the server has logged since a mark."""
        with self.log_path.open("rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")

    def database(self, name: str, role: str) -> Database:
        """The handle of a database by its name."""
        return Database(name, self.server.url(role, name), self.server.url(postgres.SUPERUSER, name))

    async def users_database(self) -> Database:
        """A fresh database at the newest revision, with a log of its own."""
        made = await self._copy("users")
        await made.fetch("UPDATE feed SET log_id = gen_random_uuid()")
        return made

    async def notifications_database(self) -> Database:
        """A fresh database at the newest revision."""
        return await self._copy("notifications")

    async def blank_database(self, kind: Kind) -> Database:
        """A fresh database without any table, for tests that migrate it themselves."""
        name, role = f"test_{kind}_{uuid.uuid4().hex[:12]}", f"tidings_{kind}"
        await postgres.ensure_database(self.server, name, role)
        return self.database(name, role)

    async def drop(self, made: Database) -> None:
        """Removes a database, whoever is connected to it."""
        await self._admin(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(made.name)))

    async def _copy(self, kind: Kind) -> Database:
        role, template = f"tidings_{kind}", f"tidings_{kind}_template"
        async with self._locks[kind]:
            if kind not in self._migrated:
                await postgres.ensure_database(self.server, template, role)
                await migrate(kind, self.server.url(role, template))
                self._migrated.add(kind)
            name = f"test_{kind}_{uuid.uuid4().hex[:12]}"
            await self._admin(
                SQL("CREATE DATABASE {} OWNER {} TEMPLATE {} STRATEGY file_copy").format(
                    Identifier(name), Identifier(role), Identifier(template)
                )
            )
        return self.database(name, role)

    async def _admin(self, statement: object) -> None:
        url = self.server.url(postgres.SUPERUSER, postgres.SUPERUSER)
        async with await database.connect(url, "test") as connection:
            await connection.execute(statement)  # type: ignore[call-overload]


class Databases:
    """Makes databases for one test and removes them at its end."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._made: list[Database] = []

    async def users(self) -> Database:
        """A fresh users database at the newest revision, with a log of its own."""
        return self._noted(await self._server.users_database())

    async def notifications(self) -> Database:
        """A fresh notifications database at the newest revision."""
        return self._noted(await self._server.notifications_database())

    async def blank(self, kind: Kind) -> Database:
        """A fresh database without any table, for tests that migrate it themselves."""
        return self._noted(await self._server.blank_database(kind))

    async def drop(self) -> None:
        """Removes them, whoever is connected."""
        for made in self._made:
            await self._server.drop(made)
        self._made.clear()

    def _noted(self, made: Database) -> Database:
        self._made.append(made)
        return made


def _memory() -> Path | None:
    """A directory in memory, if there is one with enough room for what the tests of a session write."""
    try:
        free = shutil.disk_usage(_MEMORY).free
    except OSError:
        return None
    return _MEMORY if free >= _ENOUGH and os.access(_MEMORY, os.W_OK) else None


async def migrate(kind: Kind, url: str, *arguments: str) -> str:
    """Runs the shipped migrations on a database: `upgrade KIND`, or `arguments`. Returns what they printed."""
    variables = {**clean_environment(), f"TIDINGS_{kind.upper()}_DATABASE_URL": url}
    process = await programs.start("migrations", *(arguments or ("upgrade", kind)), environment=variables)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()
