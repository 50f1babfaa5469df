"""Volumes of a pod, made as a kubelet makes them: files of root that the pod's group may read, and empty folders.

A Secret or ConfigMap is a folder of links through `..data`, so that all of its files change at once. Empty folders are
on the disk, those in memory too, for they outlive a container that is started again; nothing holds them to their size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.containers.manifests import ManifestError, Objects

_REVISION = "..1"


@dataclass(frozen=True, slots=True)
class Mounted:
    """The folders of a pod's volumes by name."""

    folders: Mapping[str, Path]

    def arguments(self, container: Mapping[str, Any]) -> list[str]:
        """The mounts of a container, for `docker run`."""
        arguments: list[str] = []
        for mount in container.get("volumeMounts", []):
            name, path = mount["name"], mount["mountPath"]
            if unknown := set(mount) - {"name", "mountPath", "readOnly"}:
                raise ManifestError(f"volume mount {name}: not carried out here: {sorted(unknown)}")
            arguments += ["--volume", f"{self.folders[name]}:{path}:{'ro' if mount.get('readOnly') else 'rw'}"]
        return arguments


def make(folder: Path, spec: Mapping[str, Any], objects: Objects, claims: Mapping[str, Path]) -> Mounted:
    """Makes the volumes of a pod in a folder. `claims` are folders that outlive it."""
    group = spec.get("securityContext", {}).get("fsGroup", 0)
    folders: dict[str, Path] = {name: _open(path, group) for name, path in claims.items()}
    for volume in spec.get("volumes", []):
        name = volume["name"]
        [kind] = set(volume) - {"name"}
        source = volume[kind] or {}
        if kind == "emptyDir":
            folders[name] = _open(folder / name, group)
        elif kind in ("secret", "configMap"):
            of = ("Secret", source["secretName"]) if kind == "secret" else ("ConfigMap", source["name"])
            data = objects.data(*of)
            chosen = {item["key"]: item["path"] for item in source.get("items", [])} or {key: key for key in data}
            files = {path: data[key] for key, path in chosen.items()}
            folders[name] = _files(folder / name, files, source.get("defaultMode", 0o644), group)
        else:
            raise ManifestError(f"volume {name}: {kind} is not carried out here")
    return Mounted(folders)


def _open(path: Path, group: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, 0, group)
    path.chmod(0o2777)
    return path


def _files(path: Path, files: Mapping[str, bytes], mode: int, group: int) -> Path:
    revision = path / _REVISION
    revision.mkdir(parents=True, exist_ok=True)
    for folder in (path, revision):
        folder.chmod(0o755)
    for name, content in files.items():
        (file := revision / name).write_bytes(content)
        os.chown(file, 0, group)
        file.chmod(mode | (0o440 if group else 0))
        (path / name).symlink_to(Path("..data") / name)
    (path / "..data").symlink_to(_REVISION)
    return path
