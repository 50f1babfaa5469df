"""An overlay rendered as for a release: with an image, in a namespace of its own, with Secrets of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.driver import Object

ROOT = Path(__file__).parents[2]
_GENERATED = "components/development/generated"
_TIMEOUT = 60.0


class Overlay:
    """A copy of `deploy` in a folder: what a run changes, it changes there, and its Secrets stay the same in it."""

    def __init__(self, folder: Path, name: str, namespace: str) -> None:
        self._deploy = folder / "deploy"
        self._overlay = self._deploy / "overlays" / name
        shutil.copytree(ROOT / "deploy", self._deploy, ignore=shutil.ignore_patterns("generated", "__pycache__"))
        generated = self._deploy / _GENERATED
        _said([sys.executable, "-m", "deploy.secrets", "--directory", str(generated)])
        self._change(namespace=namespace)

    def render(self, image: str) -> list[Object]:
        """The objects with an image `name:tag`, set as `kustomize edit set image` sets it."""
        name, _, tag = image.rpartition(":")
        self._change(images=[{"name": "tidings", "newName": name, "newTag": tag}])
        kubectl = Path(sys.executable).with_name("kubectl")
        rendered = _said([str(kubectl) if kubectl.exists() else "kubectl", "kustomize", str(self._overlay)])
        return [one for one in yaml.safe_load_all(rendered) if one]

    def _change(self, **fields: Any) -> None:
        path = self._overlay / "kustomization.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields, sort_keys=False))


def _said(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
