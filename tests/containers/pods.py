"""One pod as containers: what a kubelet does with it, from its volumes to its end.

Init containers run to their end, one after the other and again if they fail; then the container runs, is probed and, if
it ends or does not live, started again. A pod that is deleted is unready at once, sleeps as its preStop says, gets the
stop signal and, when its grace is over, SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.containers import manifests, probes, volumes
from tests.containers.docker import Docker
from tests.containers.manifests import Object, Objects

LABEL = "tidings.test-run"
_SEEN_WITHIN = 10.0
_BACKOFF = (0.0, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Place:
    """Where pods live: an engine, a network, a folder of the run, and images that stand for others."""

    docker: Docker
    folder: Path
    network: str
    gateway: str
    namespace: str
    stand_ins: Mapping[str, str]

    @property
    def label(self) -> str:
        """What marks every container of the run."""
        return f"{LABEL}={self.network}"


class Pod:
    """A pod that runs from `start` to `delete`. `why` says what it waits for, or how it ended."""

    def __init__(
        self, place: Place, name: str, template: Object, key: str, objects: Objects, claims: Mapping[str, Path]
    ) -> None:
        manifests.check(template["spec"])
        self.name = name
        self.key = key
        self.labels: Mapping[str, str] = template["metadata"].get("labels", {})
        self.spec: Mapping[str, Any] = template["spec"]
        self.ready = False
        self.deleting = False
        self.exit_code: int | None = None
        self.restarts = 0
        self.address = ""
        self.why = "not started"
        self.container = f"{place.network}-{name}"
        self._place = place
        self._objects = objects
        self._claims = claims
        self._task: asyncio.Task[None] | None = None

    def start(self) -> Pod:
        """Begins to live."""
        self._task = asyncio.create_task(self._live(), name=self.name)
        return self

    @property
    def over(self) -> bool:
        """Whether it ended for good."""
        return self._task is not None and self._task.done()

    def raise_problem(self) -> None:
        """Raises what went wrong in the life of a pod that is over and could not live."""
        assert self._task is not None
        self._task.result()

    async def logs(self, *arguments: str) -> str:
        """What its container wrote, or its init containers if that did not start."""
        docker = self._place.docker
        names = [self.container, *(f"{self.container}-{init['name']}" for init in self._inits())]
        for name in names:
            code, output = await docker.run("logs", *arguments, name)
            if code == 0:
                return output
        return ""

    async def execute(self, *command: str, timeout: float = 60.0) -> tuple[int, str]:
        """Runs a command in its container; the exit code and what was printed."""
        return await self._place.docker.run("exec", self.container, *command, timeout=timeout)

    async def kill(self) -> None:
        """SIGKILL, as when a node dies: nothing is said to anybody."""
        self.deleting = True
        await self._place.docker.run("kill", "--signal", "KILL", self.container)
        await self.delete(grace=0)

    async def delete(self, grace: float | None = None) -> None:
        """Ends it as Kubernetes does."""
        self.deleting, self.ready = True, False
        seconds = float(self.spec.get("terminationGracePeriodSeconds", 30)) if grace is None else grace
        sleep = self._main().get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if seconds and self.address:
            await asyncio.sleep(min(sleep, seconds))
            rest = max(1, round(seconds - sleep))
            await self._place.docker.run("stop", "--time", str(rest), self.container, timeout=rest + 30)
            if self._task is not None and self.address:
                # It sees the end, and with which exit code.
                await asyncio.wait([self._task], timeout=_SEEN_WITHIN)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for name in (self.container, *(f"{self.container}-{init['name']}" for init in self._inits())):
            await self._place.docker.run("rm", "--force", "--volumes", name)
        # Its volumes go with it; those it claimed are elsewhere.
        await asyncio.to_thread(shutil.rmtree, self._place.folder / self.name, ignore_errors=True)
        self.why = "deleted"

    def _main(self) -> Mapping[str, Any]:
        main: Mapping[str, Any] = self.spec["containers"][0]
        return main

    def _inits(self) -> list[Mapping[str, Any]]:
        return list(self.spec.get("initContainers", []))

    async def _live(self) -> None:
        forever = self.spec.get("restartPolicy", "Always") == "Always"
        mounted = volumes.make(self._place.folder / self.name, self.spec, self._objects, self._claims)
        for init in self._inits():
            name = f"{self.container}-{init['name']}"
            for attempt in itertools.count():
                self.why = f"init container {init['name']} runs, attempt {attempt + 1}"
                await self._place.docker(*self._run_arguments(name, init, mounted))
                code = int(await self._place.docker("wait", name, timeout=3600))
                if code == 0:
                    break
                _, said = await self._place.docker.run("logs", "--tail", "3", name)
                self.why = f"init container {init['name']} ended with {code}: {said.strip()}"
                if not forever:
                    self.exit_code = code
                    return
                await asyncio.sleep(_BACKOFF[min(attempt + 1, len(_BACKOFF) - 1)])
                await self._place.docker.run("rm", "--force", name)
        self.why = "container is being started"
        await self._place.docker(*self._run_arguments(self.container, self._main(), mounted))
        while True:
            self.address = await self._place.docker(
                "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", self.container
            )
            probing = asyncio.create_task(self._probe())
            try:
                code = int(await self._place.docker("wait", self.container, timeout=36_000))
            finally:
                probing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await probing
                self.ready = False
            self.exit_code = code
            self.why = f"container ended with {code}"
            if self.deleting or not forever:
                return
            self.restarts += 1
            await asyncio.sleep(_BACKOFF[min(self.restarts - 1, len(_BACKOFF) - 1)])
            await self._place.docker("start", self.container)

    def _run_arguments(self, name: str, container: Mapping[str, Any], mounted: volumes.Mounted) -> list[str]:
        """The manifest's container as arguments of `docker run`."""
        pod = self.spec.get("securityContext", {})
        own = container.get("securityContext", {})
        both = {**pod, **own}
        fields = {"metadata.name": self.name, "metadata.namespace": self._place.namespace}
        arguments = ["run", "--detach", "--name", name, "--label", self._place.label, "--network", self._place.network]
        arguments += ["--hostname", self.name, "--volume", f"{self._place.folder}/resolv.conf:/etc/resolv.conf:ro"]
        if "runAsUser" in both:
            arguments += ["--user", f"{both['runAsUser']}:{both.get('runAsGroup', 0)}"]
        if "fsGroup" in pod:
            arguments += ["--group-add", str(pod["fsGroup"])]
        if own.get("readOnlyRootFilesystem"):
            arguments += ["--read-only"]
        if own.get("allowPrivilegeEscalation") is False:
            arguments += ["--security-opt", "no-new-privileges"]
        for capability in own.get("capabilities", {}).get("drop", []):
            arguments += ["--cap-drop", capability]
        if limit := container.get("resources", {}).get("limits", {}).get("memory"):
            arguments += ["--memory", str(manifests.size(limit))]
        for key, value in manifests.environment(container, self._objects, fields).items():
            arguments += ["--env", f"{key}={value}"]
        arguments += mounted.arguments(container)
        command = container.get("command", [])
        arguments += ["--entrypoint", command[0]] if command else []
        image = container["image"]
        return [*arguments, self._place.stand_ins.get(image, image), *command[1:], *container.get("args", [])]

    async def _ask(self, probe: Mapping[str, Any]) -> str | None:
        ports = {port["name"]: int(port["containerPort"]) for port in self._main().get("ports", []) if "name" in port}
        return await probes.ask(probe, ports, self._place.docker, self.container, self.address)

    async def _probe(self) -> None:
        """Startup first; then readiness and liveness, each at its own pace."""
        main = self._main()
        if probe := main.get("startupProbe"):
            await self._until_failed(probe, "startupProbe", once=True)
        await asyncio.gather(self._follow_readiness(main.get("readinessProbe")), self._follow_liveness(main))

    async def _follow_readiness(self, probe: Mapping[str, Any] | None) -> None:
        if probe is None:
            self.ready, self.why = not self.deleting, "runs"
            return
        failures = 0
        while True:
            reason = await self._ask(probe)
            failures = 0 if reason is None else failures + 1
            if reason is None or failures >= probe.get("failureThreshold", 3):
                self.ready = reason is None and not self.deleting
            self.why = f"readiness: {reason}" if reason else "ready"
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _follow_liveness(self, main: Mapping[str, Any]) -> None:
        if probe := main.get("livenessProbe"):
            await self._until_failed(probe, "livenessProbe", once=False)

    async def _until_failed(self, probe: Mapping[str, Any], name: str, *, once: bool) -> None:
        """Asks until the first success (`once`), or for ever; a container that fails is stopped, and started again."""
        failures = 0
        while failures < probe.get("failureThreshold", 3):
            reason = await self._ask(probe)
            failures = 0 if reason is None else failures + 1
            if reason is None and once:
                return
            if reason is not None:
                self.why = f"{name}: {reason}"
            await asyncio.sleep(probe.get("periodSeconds", 10))
        grace = self.spec.get("terminationGracePeriodSeconds", 30)
        await self._place.docker.run("stop", "--time", str(grace), self.container, timeout=grace + 30)
