"""Runs the programs of Tidings as processes: `python -m MODULE ARGUMENT...`, without importing everything for each.

Importing is most of what a process of ours costs: half a second of a processor and more, hundreds of times. So the
first run of a program starts a nursery (see nursery.py) that has imported it, and each run is a fork of that. What only
a new interpreter can have (variables that Python or the loader reads, modules that are in no list here) is started as
it is in production; with TIDINGS_TEST_FORK=0 in the environment everything is.

A process is a child of its nursery, which dies with this one; so nothing outlives pytest, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import devstack.child

_LIMIT = 1 << 24
_LONGEST_ANSWER = 1 << 16
_SCRIPT = Path(__file__).with_name("nursery.py")
# What is imported before a program runs: nothing that it would not import by itself.
_IMPORTED = {
    "user_service": ("user_service.__main__",),
    "notification_service": ("notification_service.__main__",),
    "console": ("console.__main__",),
    "migrations": ("migrations.__main__",),
    "devstack": ("devstack.__main__", "devstack.mailcatcher"),
    "tidings.cli": ("tidings.cli.app",),
}
# Read by a new interpreter, by the loader, or by what is imported.
_OF_AN_INTERPRETER = ("PYTHON", "LD_", "GRPC_", "LC_", "LANG", "TZ", "OPENSSL_", "OTEL_PYTHON_", "OTEL_PROPAGATORS")


def clean_environment() -> dict[str, str]:
    """This process's environment without what configures Tidings or telemetry: a developer's shell must not matter."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("TIDINGS_", "OTEL_"))}


@dataclass(eq=False)
class Process:
    """A running program; `stdout` is what it prints, with its errors unless `stderr` has those."""

    pid: int
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader | None
    ended: asyncio.Future[int]

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal if one killed it."""
        return self.ended.result() if self.ended.done() else None

    async def wait(self) -> int:
        """Waits for its end; its exit code, or minus the signal."""
        return await asyncio.shield(self.ended)

    async def communicate(self) -> tuple[bytes, bytes]:
        """Waits for its end; what it printed and its errors, if they are apart."""
        output, errors = await asyncio.gather(
            self.stdout.read(), self.stderr.read() if self.stderr else asyncio.sleep(0, b"")
        )
        await self.wait()
        return output, errors

    def send_signal(self, signum: int) -> None:
        """Sends a signal; nothing happens if it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


@dataclass(eq=False)
class _Nursery:
    """A process that forks. Belongs to one event loop, and ends with this process if not before."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    begun: asyncio.Queue[tuple[int, asyncio.Future[int]] | None] = field(default_factory=asyncio.Queue)
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    running: dict[int, asyncio.Future[int]] = field(default_factory=dict)
    is_gone: bool = False

    @classmethod
    def start(cls, module: str) -> _Nursery:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            process = subprocess.Popen(
                [
                    sys.executable, "-S", "-E", str(Path(devstack.child.__file__)), str(os.getpid()),
                    sys.executable, str(_SCRIPT), module, str(its.fileno()), *_IMPORTED[module],
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env=clean_environment(),
                start_new_session=True,
            )  # fmt: skip
        ours.setblocking(False)
        made = cls(process, ours)
        asyncio.get_running_loop().add_reader(ours, made._hear)
        return made

    async def fork(
        self, arguments: tuple[str, ...], environment: Mapping[str, str], directory: Path, outputs: list[int]
    ) -> tuple[int, asyncio.Future[int]]:
        """A new process: its pid, and what will have its exit code."""
        request = {"arguments": arguments, "environment": dict(environment), "directory": str(directory)}
        async with self.asking:
            if not self.is_gone:
                socket.send_fds(self.connection, [json.dumps(request).encode()], outputs)
            if (begun := await self.begun.get()) is None:
                self.begun.put_nowait(None)
                raise RuntimeError(f"what forks {self.process.args!r} has ended")
        return begun

    def _hear(self) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                try:
                    packet = self.connection.recv(_LONGEST_ANSWER)
                except BlockingIOError:
                    return
                if not packet:
                    break
                said = json.loads(packet)
                if "begun" in said:
                    ended = self.running[said["begun"]] = asyncio.get_running_loop().create_future()
                    self.begun.put_nowait((said["begun"], ended))
                else:
                    self.running.pop(said["ended"]).set_result(said["code"])
        self.close()

    def close(self) -> None:
        """Ends it, and with it what it has forked."""
        if self.is_gone:
            return
        self.is_gone = True
        asyncio.get_running_loop().remove_reader(self.connection)
        self.connection.close()
        self.process.kill()
        self.process.wait()
        for ended in self.running.values():
            ended.set_result(-signal.SIGKILL)
        self.running.clear()
        self.begun.put_nowait(None)


_nurseries: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Nursery]] = weakref.WeakKeyDictionary()


def _of_an_interpreter(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_OF_AN_INTERPRETER)}


_OURS = _of_an_interpreter(clean_environment())


async def start(
    module: str, *arguments: str, environment: Mapping[str, str], directory: Path | None = None, apart: bool = False
) -> Process | asyncio.subprocess.Process:
    """Starts a program with exactly this environment, in this directory or ours, and with nothing to read. What it
    prints is in `stdout`, and its errors too unless they are to be `apart`.
    """
    place = directory or Path.cwd()
    forks = os.environ.get("TIDINGS_TEST_FORK") != "0" and module in _IMPORTED
    if not forks or _of_an_interpreter(environment) != _OURS:
        return await asyncio.create_subprocess_exec(
            # The wrapper becomes the program and ties its life to ours.
            sys.executable, "-S", "-E", str(Path(devstack.child.__file__)), str(os.getpid()),
            sys.executable, "-m", module, *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if apart else asyncio.subprocess.STDOUT,
            env=dict(environment),
            cwd=place,
            start_new_session=True,
            limit=_LIMIT,
        )  # fmt: skip
    found = _nurseries.setdefault(asyncio.get_running_loop(), {})
    if module not in found or found[module].is_gone:
        found[module] = _Nursery.start(module)
    readers, outputs = [], []
    for _ in range(2 if apart else 1):
        readable, writable = os.pipe()
        readers.append(await _reading(readable))
        outputs.append(writable)
    try:
        pid, ended = await found[module].fork(arguments, environment, place, [outputs[0], outputs[-1]])
    finally:
        for one in outputs:
            os.close(one)
    return Process(pid, readers[0], readers[1] if apart else None, ended)


async def _reading(descriptor: int) -> asyncio.StreamReader:
    """What comes out of a pipe. It is closed at its end."""
    reader = asyncio.StreamReader(limit=_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    return reader


async def stop() -> None:
    """Ends what forks in this event loop."""
    for one in _nurseries.pop(asyncio.get_running_loop(), {}).values():
        one.close()
