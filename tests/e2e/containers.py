"""The steps' driver on containers of Docker."""

from __future__ import annotations

from tests.containers.cluster import Cluster
from tests.containers.pods import Pod
from tests.e2e.driver import FailedError, Object

_APP = "app.kubernetes.io/name"


class ContainersDriver:
    """A `Driver`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    async def apply(self, objects: list[Object]) -> None:
        self.cluster.apply(objects)

    async def job(self, name: str) -> bool | None:
        self._works()
        return self.cluster.workloads["Job", name].complete

    async def rolled_out(self, kind: str, name: str) -> str | None:
        self._works()
        workload = self.cluster.workloads[kind, name]
        if workload.rolled_out:
            return None
        return f"{workload.replicas} wanted; " + "; ".join(_at(pod) for pod in workload.pods)

    async def restart(self, deployment: str) -> None:
        self.cluster.restart(deployment)

    async def scale(self, deployment: str, replicas: int) -> None:
        self.cluster.scale(deployment, replicas)

    async def ready(self, app: str) -> list[str]:
        return [pod.name for pod in self.cluster.every_pod() if pod.ready and pod.labels.get(_APP) == app]

    async def kill(self, pod: str) -> None:
        await self._pod(pod).kill()

    async def exit_code(self, pod: str) -> int | None:
        found = self._pod(pod)
        if found.over:
            found.raise_problem()
        return found.exit_code if found.over else None

    async def logs(self, pod: str) -> str:
        return await self._pod(pod).logs()

    async def job_logs(self, name: str) -> str:
        return "".join([await pod.logs() for pod in self.cluster.workloads["Job", name].pods])

    async def execute(self, pod: str, *command: str) -> str:
        code, output = await self._pod(pod).execute(*command)
        if code != 0:
            raise FailedError(f"{pod}: {' '.join(command)}: exit code {code}: {output.strip()}")
        return output

    async def why(self) -> str:
        lines: list[str] = []
        for pod in self.cluster.every_pod():
            lines.append(_at(pod))
            if not pod.ready:
                lines += [f"    {line}" for line in (await pod.logs("--tail", "8")).splitlines()]
        return "\n".join(lines)

    def _works(self) -> None:
        if self.cluster.problem is not None:
            raise FailedError("a controller failed") from self.cluster.problem

    def _pod(self, name: str) -> Pod:
        return next(pod for pod in self.cluster.every_pod() if pod.name == name)


def _at(pod: Pod) -> str:
    return f"{pod.name}: {pod.why}" + (f", restarted {pod.restarts} times" if pod.restarts else "")
