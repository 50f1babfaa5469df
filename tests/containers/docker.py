"""The command line of Docker, and an engine for a run where none answers.

An engine of our own lives in a folder of the run and ends with it. It writes no rules of a packet filter, for those
would stay, and makes no bridge: a network is made, and removed, by who needs it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 60.0


class UnavailableError(Exception):
    """Containers cannot be had here; the message says why."""


class DockerError(Exception):
    """A command of Docker that failed; the message has what it said."""


@dataclass(frozen=True, slots=True)
class Docker:
    """A client of one engine. `host` is empty for the engine that the environment names."""

    executable: str
    host: str = ""
    # Whether the engine is ours, and so keeps its hands off the packet filter.
    own: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to use this engine."""
        return {**os.environ, "DOCKER_BUILDKIT": "1", **({"DOCKER_HOST": self.host} if self.host else {})}

    async def __call__(self, *arguments: str, data: bytes | None = None, timeout: float = 120.0) -> str:
        """What the command prints, without white space around it. Raises DockerError."""
        code, output = await self.run(*arguments, data=data, timeout=timeout)
        if code != 0:
            raise DockerError(f"docker {arguments[0]}: exit code {code}: {output.strip()[-2000:]}")
        return output.strip()

    async def run(self, *arguments: str, data: bytes | None = None, timeout: float = 120.0) -> tuple[int, str]:
        """The exit code, and what was printed to either output."""
        process = await asyncio.create_subprocess_exec(
            self.executable, *arguments,
            stdin=asyncio.subprocess.DEVNULL if data is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.environment,
        )  # fmt: skip
        try:
            async with asyncio.timeout(timeout):
                output, _ = await process.communicate(data)
        except BaseException as error:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if isinstance(error, TimeoutError):
                raise DockerError(f"docker {arguments[0]}: not done within {timeout:g} s") from None
            raise
        assert process.returncode is not None
        return process.returncode, output.decode(errors="replace")

    async def answers(self) -> bool:
        """Whether there is an engine."""
        try:
            return (await self.run("version", timeout=10))[0] == 0
        except DockerError:
            return False


async def client() -> str:
    """A docker that builds with BuildKit. Raises UnavailableError."""
    found = [
        str(path) for folder in os.get_exec_path() if os.access(path := Path(folder) / "docker", os.X_OK)
    ]  # fmt: skip
    for executable in found:
        docker = Docker(executable, "unix:///nowhere")
        _, version = await docker.run("--version")
        # Before 23 BuildKit was part of the client, and since then it is a plugin.
        major = version.removeprefix("Docker version ").partition(".")[0]
        if (major.isdecimal() and int(major) < 23) or (await docker.run("buildx", "version"))[0] == 0:
            return executable
    raise UnavailableError(f"{', '.join(found)} has no BuildKit" if found else "there is no docker on PATH")


@asynccontextmanager
async def engine(folder: Path) -> AsyncIterator[Docker]:
    """The engine that answers already, or one of our own in this folder. Raises UnavailableError."""
    executable = await client()
    there = Docker(executable)
    if await there.answers():
        yield there
        return
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        raise UnavailableError("no Docker engine answers, and starting one takes dockerd and root")
    docker = Docker(executable, f"unix://{folder}/docker.sock", own=True)
    with (folder / "dockerd.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "dockerd", "--host", docker.host, "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"),
            "--pidfile", str(folder / "dockerd.pid"), "--iptables=false", "--ip6tables=false", "--bridge=none",
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        await _started(docker, process, folder / "dockerd.log")
        yield docker
    finally:
        await _stop(process)


async def _started(docker: Docker, process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = asyncio.get_running_loop().time() + _START_TIMEOUT
    while not await docker.answers():
        if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
            lines = log.read_text(errors="replace").splitlines()[-3:]
            raise UnavailableError(f"dockerd does not start here: {' | '.join(lines)}")
        await asyncio.sleep(0.2)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_TIMEOUT):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
