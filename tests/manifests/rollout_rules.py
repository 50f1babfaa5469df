"""Rules that make a rollout harmless: first the schema, then pod after pod, each with the time that its end takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from notification_service.settings import NotificationServiceSettings
from servicekit import rpc
from servicekit.settings import ServerSettings, variable
from tests.manifests.objects import Object, Pod, environment, matches, of_kind, pods
from user_service.settings import UserServiceSettings

_SETTINGS: Mapping[str, type[ServerSettings]] = {
    "user-service": UserServiceSettings,
    "notification-service": NotificationServiceSettings,
}
# What a service of ours takes besides, in seconds: telling health, and letting calls that were received begin.
_TELL_HEALTH = 1.0
# What a service takes at its end by its settings, one after the other.
_LASTING = ("drain_time", "unknown_outcome_wait", "grace")


def schema_first(objects: Sequence[Object]) -> Iterator[str]:
    """One Job migrates, named after its image; whoever has a database waits for its schema by the same image."""
    jobs = list(of_kind(objects, "Job"))
    if len(jobs) != 1:
        yield f"there are {len(jobs)} Jobs"
        return
    [job] = jobs
    [container] = job["spec"]["template"]["spec"]["containers"]
    if container["args"] != ["migrations", "upgrade", "all"]:
        yield "the Job does not migrate all"
    tag = container["image"].partition("@")[0].rpartition(":")[2]
    if job["metadata"]["name"] != f"migrations-{tag}":
        yield f"Job/{job['metadata']['name']}: is not named after its image, {container['image']}"
    for pod in pods(objects):
        if pod.name in _SETTINGS:
            kind = pod.name.partition("-")[0]
            kind = "users" if kind == "user" else "notifications"
            waits = [one for one in pod.spec.get("initContainers", ()) if one["args"] == ["migrations", "wait", kind]]
            if [one["image"] for one in waits] != [container["image"]]:
                yield f"{pod.where}: does not wait for the schema by the image that makes it"


def one_after_the_other(objects: Sequence[Object]) -> Iterator[str]:
    """No pod goes before another is ready in its place."""
    for one in of_kind(objects, "Deployment"):
        name, spec = one["metadata"]["name"], one["spec"]
        if name not in _SETTINGS:
            continue
        update = spec.get("strategy", {}).get("rollingUpdate", {})
        if update.get("maxUnavailable") != 0 or not update.get("maxSurge"):
            yield f"Deployment/{name}: a pod goes before another is ready"


def time_to_end(objects: Sequence[Object]) -> Iterator[str]:
    """preStop and all that the settings give fit into the grace period, and leave something."""
    for pod in pods(objects):
        if pod.name not in _SETTINGS:
            continue
        [container] = pod.spec["containers"]
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if not before:
            yield f"{pod.where}: is not asked to wait until nobody is sent to it"
        needed = before + _lasts(pod, environment(container, objects))
        if pod.spec.get("terminationGracePeriodSeconds", 30) <= needed:
            yield f"{pod.where}: needs {needed:g} s to end, and does not get more"


def _lasts(pod: Pod, values: Mapping[str, str]) -> float:
    settings = _SETTINGS[pod.name]
    seconds = _TELL_HEALTH + rpc.LONGEST_SETTLE
    for field in _LASTING:
        if field in settings.model_fields:
            seconds += float(values.get(variable(settings, field), settings.model_fields[field].default))
    return seconds


def high_availability(objects: Sequence[Object]) -> Iterator[str]:
    """For production: several of each, on several nodes, whose number follows the load and does not fall at a drain."""
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one for one in of_kind(objects, "HorizontalPodAutoscaler")}
    budgets = list(of_kind(objects, "PodDisruptionBudget"))
    for pod in pods(objects):
        if pod.kind != "Deployment":
            continue
        [deployment] = [one for one in of_kind(objects, "Deployment") if one["metadata"]["name"] == pod.name]
        scale = scaled.get(pod.name)
        if scale is None or scale["spec"]["minReplicas"] < 2:
            yield f"{pod.where}: is not scaled, from 2 on"
        if "replicas" in deployment["spec"]:
            yield f"{pod.where}: applying it takes the autoscaler's number back"
        if sum(matches(one["spec"]["selector"], pod.labels) for one in budgets) != 1:
            yield f"{pod.where}: has no disruption budget"
        spread = {one["topologyKey"]: one for one in pod.spec.get("topologySpreadConstraints", ())}
        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone"):
            if key not in spread or not matches(spread[key]["labelSelector"], pod.labels):
                yield f"{pod.where}: is not spread by {key}"
    for one in of_kind(objects, "Cluster"):
        spec = one["spec"]
        if spec["instances"] < 3 or not spec["postgresql"].get("synchronous", {}).get("number"):
            yield f"Cluster/{one['metadata']['name']}: the loss of one server may lose what was acknowledged"
        if spec["postgresql"]["synchronous"].get("dataDurability", "required") != "required":
            yield f"Cluster/{one['metadata']['name']}: may acknowledge what one server has"
    if list(of_kind(objects, "Secret", "StatefulSet")):
        yield "production has a Secret or a database of development"


RULES = (schema_first, one_after_the_other, time_to_end)
