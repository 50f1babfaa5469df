"""What the steps ask of whatever runs the manifests, and how they wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

Object = dict[str, Any]
_LOOK = 0.5


class FailedError(Exception):
    """A step did not come to what it must; the message says why."""


class UntriedError(Exception):
    """A step cannot be tried here; the message says why."""


class Driver(Protocol):
    """One namespace. Pods are known by their names, and belong to an app by the label `app.kubernetes.io/name`."""

    async def apply(self, objects: list[Object]) -> None:
        """Wants these objects, and returns before they are there."""

    async def job(self, name: str) -> bool | None:
        """Whether a Job completed (True) or failed (False); None while it runs."""

    async def rolled_out(self, kind: str, name: str) -> str | None:
        """None if all replicas of a workload are as wanted and ready and no others are left, or why not yet."""

    async def restart(self, deployment: str) -> None:
        """Wants new pods of a Deployment."""

    async def scale(self, deployment: str, replicas: int) -> None:
        """Wants so many pods of a Deployment."""

    async def ready(self, app: str) -> list[str]:
        """The ready pods of an app."""

    async def kill(self, pod: str) -> None:
        """Ends a pod with no time to say anything."""

    async def exit_code(self, pod: str) -> int | None:
        """Of a pod that runs once; None while it runs."""

    async def logs(self, pod: str) -> str:
        """What a pod wrote."""

    async def job_logs(self, name: str) -> str:
        """What the pods of a Job wrote."""

    async def execute(self, pod: str, *command: str) -> str:
        """Runs a command in a pod. Raises FailedError if it ends with another exit code than 0."""

    async def why(self) -> str:
        """What every pod is at, for whom reads that a wait was too long."""


async def wait(
    what: str, ask: Callable[[], Awaitable[str | None]], timeout: float, say: Callable[[str], None], driver: Driver
) -> None:
    """Waits until `ask` says None and prints what is waited for, and each new reason why. Raises FailedError."""
    loop = asyncio.get_running_loop()
    deadline, said = loop.time() + timeout, ""
    while (reason := await ask()) is not None:
        if reason != said:
            say(f"waiting for {what} (at most {timeout:g} s): {reason}")
            said = reason
        if loop.time() > deadline:
            raise FailedError(f"{what}: not within {timeout:g} s: {reason}\n{await driver.why()}")
        await asyncio.sleep(_LOOK)
