"""The controllers: Deployments roll, StatefulSets and Jobs run, names of Services are answered.

`apply` says what is wanted and returns; a loop brings it about, as in a cluster. A Deployment that rolls never goes
below its replicas: one pod more is started, and an old one ends when the new one is ready.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.containers import names
from tests.containers.docker import Docker, DockerError, UnavailableError
from tests.containers.manifests import ManifestError, Object, Objects
from tests.containers.pods import LABEL, Place, Pod

_TURN = 0.1
_REMOVALS = 20
_DOMAINS = ("{}.svc.cluster.local", "svc.cluster.local", "cluster.local")
_IGNORED = {
    "Namespace", "ServiceAccount", "NetworkPolicy", "Secret", "ConfigMap", "Service", "PodDisruptionBudget",
}  # fmt: skip


@dataclass
class Workload:
    """A Deployment or StatefulSet, or a Job: what is wanted, and its pods."""

    kind: str
    wanted: Object
    restarts: int = 0
    pods: list[Pod] = field(default_factory=list)
    ending: list[asyncio.Task[None]] = field(default_factory=list)
    # Of a Job: None while it runs, then whether it completed.
    complete: bool | None = None

    @property
    def replicas(self) -> int:
        """How many pods there should be."""
        return int(self.wanted["spec"].get("replicas", 1))

    @property
    def template(self) -> Object:
        """What its pods should be."""
        template: Object = self.wanted["spec"]["template"]
        return template

    @property
    def key(self) -> str:
        """What its pods are known by: the template, and how often they were to be started anew."""
        return f"{json.dumps(self.template, sort_keys=True)} {self.restarts}"

    def current(self) -> list[Pod]:
        """The pods that are what is wanted."""
        return [pod for pod in self.pods if pod.key == self.key]

    @property
    def rolled_out(self) -> bool:
        """Whether all is as wanted."""
        new = self.current()
        return len(new) == len(self.pods) == self.replicas and all(pod.ready for pod in new)


class Cluster:
    """One namespace of one machine."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.objects = Objects({})
        self.workloads: dict[tuple[str, str], Workload] = {}
        self.pods: dict[str, Pod] = {}
        self.problem: BaseException | None = None

    def apply(self, objects: Iterable[Object]) -> None:
        """Wants these objects, besides those of before. Raises ManifestError."""
        applied = Objects.of(objects)
        self.objects = Objects({**self.objects.by_key, **applied.by_key})
        for (kind, name), one in applied.by_key.items():
            if kind == "Pod":
                self.pods[name] = self._pod(name, one, "", {}).start()
            elif kind in ("Deployment", "StatefulSet", "Job"):
                self._want(kind, name, one)
            elif kind not in _IGNORED:
                raise ManifestError(f"{kind} {name} is not carried out here")

    def _want(self, kind: str, name: str, one: Object) -> None:
        there = self.workloads.get((kind, name))
        if there is None:
            self.workloads[kind, name] = Workload(kind, one)
        elif kind != "Job":
            there.wanted = one
        elif there.template != one["spec"]["template"]:
            raise ManifestError(f"Job {name}: spec.template: field is immutable")

    def restart(self, name: str) -> None:
        """Wants new pods of a Deployment."""
        self.workloads["Deployment", name].restarts += 1

    def scale(self, name: str, replicas: int, kind: str = "Deployment") -> None:
        """Wants so many pods."""
        there = self.workloads[kind, name]
        there.wanted = {**there.wanted, "spec": {**there.wanted["spec"], "replicas": replicas}}

    def addresses(self, asked: str) -> list[str] | None:
        """The addresses of the ready pods behind a Service's name; None if there is no such Service."""
        domain = f".{_DOMAINS[0].format(self.place.namespace)}"
        service = self.objects.by_key.get(("Service", asked.removesuffix(domain))) if asked.endswith(domain) else None
        if service is None:
            return None
        wanted = service["spec"]["selector"].items()
        return [pod.address for pod in self.every_pod() if pod.ready and wanted <= pod.labels.items()]

    def every_pod(self) -> list[Pod]:
        """The pods that are not being deleted, those that have ended included."""
        return [*self.pods.values(), *(pod for workload in self.workloads.values() for pod in workload.pods)]

    async def work(self) -> None:
        """The loop that brings about what is wanted; it ends only with the cluster, or with a problem."""
        try:
            while True:
                for (kind, name), workload in list(self.workloads.items()):
                    if kind == "Job":
                        self._turn_job(name, workload)
                    else:
                        self._turn(kind, name, workload)
                await asyncio.sleep(_TURN)
        except Exception as error:
            self.problem = error
            raise

    def _turn(self, kind: str, name: str, workload: Workload) -> None:
        for pod in [pod for pod in workload.pods if pod.over or pod.deleting]:
            workload.pods.remove(pod)
            if not pod.deleting:
                pod.raise_problem()
                workload.ending.append(asyncio.create_task(pod.delete(grace=0)))
        new = workload.current()
        old = [pod for pod in workload.pods if pod not in new]
        strategy = workload.wanted["spec"].get("strategy", {}).get("type", "RollingUpdate")
        surge = 1 if kind == "Deployment" and strategy == "RollingUpdate" else 0
        for task in [task for task in workload.ending if task.done()]:
            workload.ending.remove(task)
            task.result()
        if len(new) < workload.replicas and len(workload.pods) < workload.replicas + surge:
            # What has one pod at a time waits for the end of the one before.
            if surge or not workload.ending:
                workload.pods.append(self._started(kind, name, workload))
            return
        ready = sum(pod.ready for pod in workload.pods)
        for pod in sorted(old or new[workload.replicas :], key=lambda pod: pod.ready):
            if not pod.ready or ready > workload.replicas or not surge:
                workload.pods.remove(pod)
                workload.ending.append(asyncio.create_task(pod.delete()))
                ready -= pod.ready
                return

    def _turn_job(self, name: str, workload: Workload) -> None:
        spec = workload.wanted["spec"]
        if workload.complete is not None:
            return
        if not workload.pods or (workload.pods[-1].over and workload.pods[-1].exit_code != 0):
            last = workload.pods[-1].exit_code if workload.pods else None
            rules = spec.get("podFailurePolicy", {}).get("rules", [])
            fatal = any(
                rule["action"] == "FailJob" and last in rule["onExitCodes"]["values"]
                for rule in rules if "onExitCodes" in rule
            )  # fmt: skip
            if fatal or len(workload.pods) > spec.get("backoffLimit", 6):
                workload.complete = False
            else:
                workload.pods.append(self._started("Job", name, workload))
        elif workload.pods[-1].over:
            workload.complete = True

    def _started(self, kind: str, name: str, workload: Workload) -> Pod:
        suffix = str(len(workload.pods)) if kind == "StatefulSet" else secrets.token_hex(3)
        claims = {
            claim["metadata"]["name"]: self.place.folder / "claims" / f"{claim['metadata']['name']}-{name}-{suffix}"
            for claim in workload.wanted["spec"].get("volumeClaimTemplates", [])
        }
        return self._pod(f"{name}-{suffix}", workload.template, workload.key, claims).start()

    def _pod(self, name: str, template: Object, key: str, claims: Mapping[str, Path]) -> Pod:
        return Pod(self.place, name, template, key, self.objects, claims)

    async def delete(self) -> None:
        """Ends everything."""
        ending = [task for workload in self.workloads.values() for task in workload.ending]
        await asyncio.gather(*ending, *(pod.delete(grace=0) for pod in self.every_pod()))


@asynccontextmanager
async def opened(docker: Docker, folder: Path, namespace: str, stand_ins: Mapping[str, str]) -> AsyncIterator[Cluster]:
    """A cluster with nothing in it, which leaves nothing behind."""
    network = f"tidings-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        bridge = f"br-{network[-8:]}"
        await docker("network", "create", "--opt", f"com.docker.network.bridge.name={bridge}", network)
        stack.push_async_callback(docker, "network", "rm", network)
        if docker.own:
            await stack.enter_async_context(_let_through(bridge))
        stack.push_async_callback(_remove, docker, network)
        gateway = await docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network)
        place = Place(docker, folder, network, gateway, namespace, stand_ins)
        domains = " ".join(domain.format(namespace) for domain in _DOMAINS)
        (folder / "resolv.conf").write_text(f"nameserver {gateway}\nsearch {domains}\noptions ndots:5\n")
        cluster = Cluster(place)
        await stack.enter_async_context(names.served(gateway, cluster.addresses))
        working = asyncio.create_task(cluster.work())
        try:
            yield cluster
        finally:
            working.cancel()
            await asyncio.wait([working])
            await cluster.delete()


@asynccontextmanager
async def _let_through(bridge: str) -> AsyncIterator[None]:
    """Containers reach each other also where another engine made the machine's packet filter drop what it forwards."""
    rule = ("FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT")
    if shutil.which("iptables") is None:
        yield
        return
    await _iptables("--insert", *rule)
    try:
        yield
    finally:
        await _iptables("--delete", *rule)


async def _iptables(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec("iptables", "--wait", *arguments)
    if await process.wait() != 0:
        raise UnavailableError(f"iptables {' '.join(arguments)}: exit code {process.returncode}")


async def _remove(docker: Docker, network: str) -> None:
    """Containers that were left, whatever happened."""
    for _ in range(_REMOVALS):
        left = (await docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={network}")).split()
        if not left:
            return
        # One that is being removed already is an error; the next look finds it gone.
        await docker.run("rm", "--force", "--volumes", *left)
    raise DockerError(f"containers cannot be removed: {left}")
