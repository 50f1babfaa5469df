"""Rendered manifests as plain objects, and the pods they come to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy import secrets

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "kind", "minikube", "production")
DEVELOPMENT = ("dev", "kind", "minikube")

Object = dict[str, Any]
Objects = list[Object]
# A rule returns its complaints; none is what it wants.
Rule = Callable[[Sequence[Object]], Iterator[str]]


def kubectl() -> Path:
    """That of the wheel, whatever else is installed."""
    return Path(sys.executable).with_name("kubectl")


def copied(parent: Path) -> Path:
    """A copy of deploy/ with secrets of its own: a developer's are not looked at."""
    target = parent / "deploy"
    shutil.copytree(ROOT / "deploy", target, ignore=shutil.ignore_patterns("generated", "__pycache__", ".render-*"))
    secrets.generate(target / "components" / "development" / "generated")
    return target


def render(folder: Path) -> Objects:
    """What `kubectl apply -k` would apply."""
    done = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one is not None]


@dataclass(frozen=True, slots=True)
class Pod:
    """The pods of a workload, as its template has them. `external` are made by an operator, of which we know labels."""

    kind: str
    name: str
    labels: Mapping[str, str]
    spec: Object
    external: bool = False

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.kind}/{self.name}"

    @property
    def containers(self) -> list[Object]:
        """Those of its life and those before it."""
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]

    @property
    def ports(self) -> dict[str, int]:
        """By name."""
        return {port["name"]: port["containerPort"] for one in self.containers for port in one.get("ports", ())}


def pods(objects: Sequence[Object]) -> list[Pod]:
    """Of every workload; the servers of a Postgres cluster too, as what policies see of them."""
    found = []
    for one in objects:
        kind, name = one["kind"], one["metadata"]["name"]
        if kind in {"Deployment", "StatefulSet", "Job", "DaemonSet", "CronJob", "Pod", "ReplicaSet"}:
            template = one["spec"]["template"]
            found.append(Pod(kind, name, template["metadata"]["labels"], template["spec"]))
        elif kind == "Cluster":
            labels = {**one["spec"]["inheritedMetadata"]["labels"], "cnpg.io/cluster": name}
            port = {"name": "postgres", "containerPort": 5432}
            found.append(Pod(kind, name, labels, {"containers": [{"name": name, "ports": [port]}]}, external=True))
    return found


def of_kind(objects: Sequence[Object], *kinds: str) -> Iterator[Object]:
    """Those of some kinds."""
    return (one for one in objects if one["kind"] in kinds)


def named(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The one of a kind by its name; a ConfigMap's ends with a hash besides, the Job's with a tag."""
    hashed = kind in {"ConfigMap", "Job"}
    [found] = [
        one
        for one in objects
        if one["kind"] == kind
        and (one["metadata"]["name"].rpartition("-")[0] if hashed else one["metadata"]["name"]) == name
    ]
    return found


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects."""
    if selector is None:
        return False
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions", ()):
        if one["operator"] != "In":
            raise NotImplementedError(one["operator"])
        if labels.get(one["key"]) not in one["values"]:
            return False
    return True


def environment(container: Object, objects: Sequence[Object]) -> dict[str, str]:
    """The plain variables of a container, those of ConfigMaps included; of a Secret only that it is one."""
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in of_kind(objects, "ConfigMap")}
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= maps.get(source["configMapRef"]["name"], {})
    for one in container.get("env", ()):
        values[one["name"]] = one.get("value", "(secret)")
    return values
