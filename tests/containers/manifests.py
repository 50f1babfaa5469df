"""Rendered manifests, read for what a container needs: a pod's containers, environment, volumes and probes.

Nothing is passed over in silence: a field that is neither carried out here nor in `LEFT_OUT` is an error.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

# What a cluster does with these is not done here, or is what Docker does anyway.
LEFT_OUT: Mapping[str, str] = {
    "serviceAccountName": "there is no API server to hold a token of",
    "automountServiceAccountToken": "as above",
    "enableServiceLinks": "no variables are made of Services",
    "topologySpreadConstraints": "there is one machine",
    "affinity": "as above",
    "fsGroupChangePolicy": "volumes are made anew",
    "priorityClassName": "nothing competes",
    "imagePullPolicy": "images are there",
    "ports": "every port of a container is reached at its address",
    "terminationMessagePolicy": "logs are shown",
}
_POD = {
    "containers", "initContainers", "volumes", "restartPolicy", "securityContext", "terminationGracePeriodSeconds",
}  # fmt: skip
_CONTAINER = {
    "name", "image", "args", "command", "env", "envFrom", "volumeMounts", "securityContext", "resources", "lifecycle",
    "startupProbe", "readinessProbe", "livenessProbe", "workingDir",
}  # fmt: skip


class ManifestError(Exception):
    """A manifest that is not understood here, or that refers to what is not there."""


@dataclass(frozen=True, slots=True)
class Objects:
    """What was applied, by kind and name."""

    by_key: Mapping[tuple[str, str], Object]

    @classmethod
    def of(cls, objects: Iterable[Object]) -> Objects:
        """One namespace's objects."""
        return cls({(one["kind"], one["metadata"]["name"]): one for one in objects})

    def all(self, kind: str) -> list[Object]:
        """Every object of a kind."""
        return [one for (of, _), one in self.by_key.items() if of == kind]

    def data(self, kind: str, name: str) -> dict[str, bytes]:
        """What is in a Secret or ConfigMap. Raises ManifestError."""
        one = self.by_key.get((kind, name))
        if one is None:
            raise ManifestError(f"there is no {kind} {name}")
        if kind == "ConfigMap":
            return {key: text.encode() for key, text in one.get("data", {}).items()}
        plain = {key: text.encode() for key, text in one.get("stringData", {}).items()}
        return {key: base64.b64decode(text) for key, text in one.get("data", {}).items()} | plain


def check(spec: Mapping[str, Any]) -> None:
    """Raises ManifestError for a field of a pod that would not be carried out."""
    unknown = set(spec) - _POD - set(LEFT_OUT)
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        unknown |= set(container) - _CONTAINER - set(LEFT_OUT)
    if unknown or len(spec["containers"]) != 1:
        raise ManifestError(f"not carried out here: {sorted(unknown) or 'several containers in a pod'}")


def environment(container: Mapping[str, Any], objects: Objects, fields: Mapping[str, str]) -> dict[str, str]:
    """A container's variables as a kubelet makes them: `envFrom`, then `env`, in which $(NAME) is one before it."""
    made: dict[str, str] = {}
    for source in container.get("envFrom", []):
        for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if key in source:
                made |= {name: text.decode() for name, text in objects.data(kind, source[key]["name"]).items()}
    for entry in container.get("env", []):
        made[entry["name"]] = _value(entry, made, objects, fields)
    return made


def _value(entry: Mapping[str, Any], before: Mapping[str, str], objects: Objects, fields: Mapping[str, str]) -> str:
    if "valueFrom" not in entry:
        return re.sub(r"\$\((\w+)\)", lambda found: before.get(found[1], found[0]), entry.get("value", ""))
    [(source, reference)] = entry["valueFrom"].items()
    if source == "fieldRef":
        return fields[reference["fieldPath"]]
    kind = {"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap"}[source]
    data = objects.data(kind, reference["name"])
    if reference["key"] not in data:
        raise ManifestError(f"{kind} {reference['name']} has no {reference['key']}")
    return data[reference["key"]].decode()


def size(quantity: str) -> int:
    """Bytes of a quantity such as 64Mi."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi|k|M|G)?", quantity)
    if found is None:
        raise ManifestError(f"{quantity} is no size that is understood here")
    factors = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 10**3, "M": 10**6, "G": 10**9}
    return int(found[1]) * (factors[found[2]] if found[2] else 1)
