"""The steps' driver on the cluster of the current context, by kubectl. The namespace is its own and goes at the end."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.e2e.driver import FailedError, Object, UntriedError, wait

_APP = "app.kubernetes.io/name"
_TIMEOUT = 90.0
_NAMESPACE_TIMEOUT = 180.0


class KubectlDriver:
    """A `Driver`."""

    def __init__(self, namespace: str) -> None:
        beside = Path(sys.executable).with_name("kubectl")
        self._kubectl = str(beside) if beside.exists() else shutil.which("kubectl") or ""
        self._namespace = namespace

    async def open(self, objects: list[Object]) -> str:
        """Makes the namespace anew; returns the context's name. Raises UntriedError where no cluster answers."""
        if not self._kubectl:
            raise UntriedError("there is no kubectl")
        code, said = await self._run("version", "--request-timeout=10s")
        if code != 0:
            raise UntriedError(f"no cluster answers: {(said.strip().splitlines() or ['nothing said'])[-1]}")
        await self.close()
        spaces = [one for one in objects if one["kind"] == "Namespace"]
        await self._do("apply", "-f", "-", data=_list(spaces))

        async def has_account() -> str | None:
            # Pods are refused until it is there.
            code, said = await self._run("get", "serviceaccount", "default")
            return None if code == 0 else said.strip()

        await wait("the namespace's account", has_account, _TIMEOUT, print, self)
        return (await self._do("config", "current-context")).strip()

    async def close(self) -> None:
        """Removes the namespace and all in it."""
        timeout = f"--timeout={_NAMESPACE_TIMEOUT:g}s"
        await self._do("delete", "namespace", self._namespace, "--ignore-not-found", timeout)

    async def apply(self, objects: list[Object]) -> None:
        await self._do("apply", "-f", "-", data=_list(objects))

    async def job(self, name: str) -> bool | None:
        conditions = (await self._get("job", name)).get("status", {}).get("conditions", [])
        true = {condition["type"] for condition in conditions if condition["status"] == "True"}
        return True if "Complete" in true else False if "Failed" in true else None

    async def rolled_out(self, kind: str, name: str) -> str | None:
        one = await self._get(kind.lower(), name)
        status, wanted = one.get("status", {}), one["spec"].get("replicas", 1)
        if status.get("observedGeneration", 0) < one["metadata"]["generation"]:
            return "the controller has not seen it yet"
        counts = {key: status.get(key, 0) for key in ("replicas", "updatedReplicas", "readyReplicas")}
        # Pods that end are no replicas any more, but are still there.
        pods = await self._pods(one["spec"]["selector"]["matchLabels"][_APP])
        counts["pods"] = len(pods)
        return None if set(counts.values()) == {wanted} else f"{wanted} wanted; {counts}"

    async def restart(self, deployment: str) -> None:
        await self._do("rollout", "restart", f"deployment/{deployment}")

    async def scale(self, deployment: str, replicas: int) -> None:
        await self._do("scale", f"deployment/{deployment}", f"--replicas={replicas}")

    async def ready(self, app: str) -> list[str]:
        return [pod["metadata"]["name"] for pod in await self._pods(app) if _is_ready(pod)]

    async def kill(self, pod: str) -> None:
        await self._do("delete", "pod", pod, "--grace-period=0", "--force")

    async def exit_code(self, pod: str) -> int | None:
        [status] = (await self._get("pod", pod)).get("status", {}).get("containerStatuses") or [{}]
        ended = status.get("state", {}).get("terminated")
        return int(ended["exitCode"]) if ended else None

    async def logs(self, pod: str) -> str:
        code, output = await self._run("logs", pod)
        if code != 0 and "waiting to start" not in output:
            raise FailedError(f"logs of {pod}: {output.strip()}")
        return output if code == 0 else ""

    async def job_logs(self, name: str) -> str:
        return await self._do("logs", f"job/{name}", "--all-pods=true")

    async def execute(self, pod: str, *command: str) -> str:
        return await self._do("exec", pod, "--", *command)

    async def why(self) -> str:
        return (await self._run("get", "pods,jobs,events", "--sort-by=.metadata.creationTimestamp"))[1]

    async def _pods(self, app: str) -> list[dict[str, Any]]:
        listed = json.loads(await self._do("get", "pods", "-l", f"{_APP}={app}", "-o", "json"))
        pods: list[dict[str, Any]] = listed["items"]
        return pods

    async def _get(self, kind: str, name: str) -> dict[str, Any]:
        one: dict[str, Any] = json.loads(await self._do("get", kind, name, "-o", "json"))
        return one

    async def _do(self, *arguments: str, data: bytes | None = None) -> str:
        code, output = await self._run(*arguments, data=data)
        if code != 0:
            raise FailedError(f"kubectl {' '.join(arguments)}: {output.strip()}")
        return output

    async def _run(self, *arguments: str, data: bytes | None = None) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            self._kubectl, "--namespace", self._namespace, *arguments,
            stdin=asyncio.subprocess.DEVNULL if data is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_NAMESPACE_TIMEOUT + _TIMEOUT):
                output, errors = await process.communicate(data)
        except TimeoutError:
            process.kill()
            await process.wait()
            return 1, "no answer"
        return process.returncode or 0, (output if process.returncode == 0 else output + errors).decode()


def _list(objects: list[Object]) -> bytes:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}).encode()


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]
