"""Rules that each pod keeps by itself. A rule returns its complaints; none is what it wants."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tests.manifests.objects import Object, of_kind, pods

# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC", "hostUsers")
_SECCOMP = ("RuntimeDefault", "Localhost")

_IMAGE = re.compile(r"(?P<name>[a-z0-9][a-z0-9./_:-]*?):(?P<tag>[\w][\w.-]*)(@sha256:[0-9a-f]{64})?")
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# What a start may take, in seconds, before the kubelet gives up.
_LONGEST_START = 60


def restricted(objects: Sequence[Object]) -> Iterator[str]:
    """Pod Security `restricted`, held where it is enforced, and a root file system that cannot be written."""
    for pod in pods(objects):
        if pod.external:
            continue
        yield from (f"{pod.where}: {name}" for name in _HOST if name in pod.spec)
        for volume in pod.spec.get("volumes", ()):
            if not set(volume) - {"name"} <= _VOLUMES:
                yield f"{pod.where}: volume {volume['name']} is of a kind that is not allowed"
        shared = pod.spec.get("securityContext", {})
        for one in pod.containers:
            where, own = f"{pod.where}/{one['name']}", one.get("securityContext", {})
            both = {**shared, **own}
            if both.get("runAsNonRoot") is not True or not both.get("runAsUser"):
                yield f"{where}: does not run as a numbered user that is not root"
            if both.get("seccompProfile", {}).get("type") not in _SECCOMP:
                yield f"{where}: has no seccomp profile"
            if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
                yield f"{where}: may gain privileges"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{where}: keeps capabilities"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{where}: can write to its root file system"
            if any("hostPort" in port for port in one.get("ports", ())):
                yield f"{where}: takes a port of the node"


def enforced(objects: Sequence[Object]) -> Iterator[str]:
    """Every object is in the one namespace, which enforces `restricted`."""
    [namespace] = of_kind(objects, "Namespace")
    if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace does not enforce `restricted`"
    for one in objects:
        if one is not namespace and one["metadata"].get("namespace") != namespace["metadata"]["name"]:
            yield f"{one['kind']}/{one['metadata']['name']}: is not in the namespace"


def no_tokens(objects: Sequence[Object]) -> Iterator[str]:
    """Nobody is given a token for Kubernetes' API, and nobody is `default`."""
    accounts = {one["metadata"]["name"]: one for one in of_kind(objects, "ServiceAccount")}
    for name, account in accounts.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{name}: mounts its token"
    for pod in pods(objects):
        if pod.external:
            continue
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.where}: has no service account of its own"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: mounts a token"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.where}: gets variables of Services, which the settings refuse"
        for volume in pod.spec.get("volumes", ()):
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", ())):
                yield f"{pod.where}: mounts a token as volume {volume['name']}"


def resources(objects: Sequence[Object]) -> Iterator[str]:
    """Processor and memory are asked for; memory is limited to what is asked for; an empty folder has an end."""
    for pod in pods(objects):
        for one in () if pod.external else pod.containers:
            asked, limits = (one.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
            if not {"cpu", "memory"} <= set(asked):
                yield f"{pod.where}/{one['name']}: does not ask for processor and memory"
            if not limits.get("memory") or limits["memory"] != asked.get("memory"):
                yield f"{pod.where}/{one['name']}: memory is not limited to what is asked for"
        for volume in pod.spec.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.where}: volume {volume['name']} has no end"


def images(objects: Sequence[Object]) -> Iterator[str]:
    """An image has an exact tag; ours are all the same."""
    ours = set()
    for pod in pods(objects):
        for one in () if pod.external else pod.containers:
            named = _IMAGE.fullmatch(one["image"])
            if named is None or named["tag"] == "latest":
                yield f"{pod.where}/{one['name']}: {one['image']} has no exact tag"
            elif named["name"].rpartition("/")[2] == "tidings":
                ours.add(one["image"])
            if one.get("imagePullPolicy") != "IfNotPresent":
                yield f"{pod.where}/{one['name']}: pulls an image it has"
    for one in of_kind(objects, "Cluster"):
        if (named := _IMAGE.fullmatch(one["spec"]["imageName"])) is None or named["tag"] == "latest":
            yield f"Cluster/{one['metadata']['name']}: {one['spec']['imageName']} has no exact tag"
    if len(ours) != 1:
        yield f"there are several of our images: {', '.join(sorted(ours)) or 'none'}"


def probes(objects: Sequence[Object]) -> Iterator[str]:
    """What serves is probed three times. Our services by gRPC and by the names that mean it, at the port for health."""
    for pod in pods(objects):
        if pod.external or pod.kind == "Job":
            continue
        for one in pod.spec["containers"]:
            where = f"{pod.where}/{one['name']}"
            missing = [name for name in _PROBES if name not in one]
            if missing:
                yield f"{where}: has no {', '.join(missing)}"
                continue
            yield from _asked_by_name(where, one)
            start = one["startupProbe"]
            if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < _LONGEST_START:
                yield f"{where}: is given up before it can have started"


def _asked_by_name(where: str, container: Object) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    if "grpc" not in ports:
        return
    for probe in _PROBES:
        name = probe.removesuffix("Probe")
        # Above all liveness: a database that is away must not restart what waits for it.
        if container[probe].get("grpc") != {"port": ports.get("health"), "service": name}:
            yield f"{where}: {probe} does not ask health for {name}"


RULES = (restricted, enforced, no_tokens, resources, images, probes)
