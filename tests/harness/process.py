"""A service as a real process: started, watched through its log and its health, killed and started again."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from devstack.parts import ask_health
from tests.harness import programs
from tests.harness.programs import clean_environment as clean_environment

_POLL = 0.05


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], Any], timeout: float = 30.0, what: str = "", poll: float = _POLL) -> Any:
    """Asks `condition` (plain or async) until it is truthy and returns what it said. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        asked = condition()
        answer = await asked if inspect.isawaitable(asked) else asked
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or inspect.getsource(condition).strip()}")
        await asyncio.sleep(poll)


class ServiceProcess:
    """`python -m MODULE ARGUMENT...`, whose log is JSON lines on standard error.

    `lines` are all lines it wrote, `records` those that are JSON objects; both go on over restarts.
    """

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str], listen_variable: str | None = None
    ) -> None:
        self._arguments = arguments
        self._environment = dict(environment)
        self._listen_variable = listen_variable
        self._process: programs.Process | asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.module = module
        self.address = ""
        # Where health is asked: the only address that does without TLS, if the service has one.
        self.health_address = ""
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        """The process id of the service itself."""
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal if one killed it."""
        assert self._process is not None
        return self._process.returncode

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.returncode is None

    async def launch(self) -> None:
        """Starts the process and returns at once. A restart listens where the first start did."""
        assert not self.alive, "it runs already"
        environment = {**clean_environment(), "TIDINGS_LOG_FORMAT": "json", **self._environment}
        if self._listen_variable:
            environment[self._listen_variable] = self.address or self._environment.get(
                self._listen_variable, "127.0.0.1:0"
            )
        self._process = await programs.start(self.module, *self._arguments, environment=environment)
        assert self._process.stdout is not None
        self._reader = asyncio.create_task(self._read(self._process.stdout))

    async def start(self, timeout: float = 60.0) -> ServiceProcess:
        """Starts it and waits until it is ready."""
        await self.launch()
        await self.wait_ready(timeout)
        return self

    async def wait_serving(self, timeout: float = 60.0) -> str:
        """Waits for the log line that says where this process serves; returns the address."""
        record = await self.wait_log("serving", timeout, pid=self.pid)
        self.address = str(record["address"])
        self.health_address = str(record.get("health_address", self.address))
        return self.address

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until its health service says that it is ready."""
        deadline = time.monotonic() + timeout
        await self.wait_serving(timeout)
        reason: str | None = ""
        while time.monotonic() < deadline:
            reason = await ask_health(self.health_address)
            if reason is None:
                return
            self._fail_if_dead()
            await asyncio.sleep(_POLL)
        raise AssertionError(f"{self.module} is not ready: {reason}\n{self.tail()}")

    async def is_ready(self) -> bool:
        """What its health service says now."""
        return await ask_health(self.health_address) is None

    async def wait_log(
        self, event: str, timeout: float = 30.0, *, pid: int | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Waits for a log record by its event and fields, also one of the past; with `pid` only of that process."""
        wanted = {"event": event, **fields} | ({"_pid": pid} if pid is not None else {})
        deadline = time.monotonic() + timeout
        while True:
            for record in self.records:
                if wanted.items() <= record.items():
                    return record
            self._fail_if_dead()
            assert time.monotonic() < deadline, f"{self.module} never logged {wanted}\n{self.tail()}"
            await asyncio.sleep(_POLL)

    def send(self, signum: signal.Signals) -> None:
        """Sends a signal to the process."""
        assert self._process is not None
        self._process.send_signal(signum)

    async def wait(self, timeout: float = 30.0) -> int:
        """Waits for its end; returns the exit code, or minus the signal."""
        assert self._process is not None
        async with asyncio.timeout(timeout):
            code = await self._process.wait()
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=1.0)
        return code

    async def kill(self, signum: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end."""
        if self.alive:
            self.send(signum)
        return await self.wait()

    async def stop(self, timeout: float = 30.0) -> int:
        """A clean shutdown: SIGTERM, SIGKILL if that takes too long."""
        if self.alive:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            try:
                return await self.wait(timeout)
            except TimeoutError:
                self.send(signal.SIGKILL)
        return await self.wait()

    async def restart(self, timeout: float = 60.0) -> None:
        """Starts it again at the same address, after its end, and waits until it is ready."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self.start(timeout)
            except AssertionError:
                # Somebody's outgoing connection may have the port for a moment: the kernel gives out any that is free.
                if "address is taken" not in self.tail() or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)
            else:
                return

    def events(self, event: str) -> list[dict[str, Any]]:
        """All log records of an event."""
        return [record for record in self.records if record.get("event") == event]

    def tail(self, lines: int = 40) -> str:
        """The newest lines it wrote."""
        return "\n".join(self.lines[-lines:])

    def _fail_if_dead(self) -> None:
        if not self.alive:
            raise AssertionError(f"{self.module} ended with {self.returncode}\n{self.tail()}")

    async def _read(self, stream: asyncio.StreamReader) -> None:
        pid = self.pid
        while line := (await stream.readline()).decode(errors="replace"):
            self.lines.append(line.rstrip("\n"))
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                self.records.append({**record, "_pid": pid})
