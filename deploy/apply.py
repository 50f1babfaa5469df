"""`python -m deploy.apply`: rolls out by kubectl alone what skaffold rolls out elsewhere, in the same order.

First what the services stand on and the Job that migrates. Only if that succeeds the services follow, and are waited
for. A migration that fails ends it there: the pods that are, serve on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
OVERLAYS = HERE / "overlays"
NAMESPACE = "tidings"

_BEFORE, _AFTER = ("infra", "schema"), ("services",)
_WORKLOADS = {"Deployment": "deployment", "StatefulSet": "statefulset"}


class DeployError(Exception):
    """It cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image by its name, which ends in `tidings`, and its tag."""

    name: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Image:
        """Of `NAME:TAG`. Raises ValueError."""
        name, _, tag = text.rpartition(":")
        if not tag or "/" in tag or name.rpartition("/")[2] != "tidings":
            raise ValueError(f"{text}: must be a name that ends in tidings, and a tag: registry/tidings:1.0")
        return cls(name, tag)


def overlay_of(context: str) -> str:
    """The overlay for a context of kubectl's. Raises DeployError if there is no telling."""
    if context.startswith("kind-"):
        return "kind"
    if context == "minikube":
        return "minikube"
    raise DeployError(f"the context {context} is neither kind's nor minikube's: name an overlay with --overlay")


def render(kubectl: str, overlay: str, modules: Sequence[str], image: Image | None) -> list[dict[str, Any]]:
    """The objects of some modules of an overlay, with another image if one is given."""
    whole = yaml.safe_load((OVERLAYS / overlay / "kustomization.yaml").read_text())
    images = whole["images"]
    if image is not None:
        images = [{"name": "tidings", "newName": image.name, "newTag": image.tag}]
    kustomization = {
        "apiVersion": whole["apiVersion"],
        "kind": whole["kind"],
        "resources": [f"../{overlay}/{module}" for module in modules],
        "images": images,
        # It names the Job, which is in one of the modules only.
        "replacements": whole["replacements"] if "schema" in modules else [],
    }
    # kustomize wants it beside what it refers to.
    with tempfile.TemporaryDirectory(dir=OVERLAYS, prefix=".render-") as directory:
        (Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return [one for one in yaml.safe_load_all(output(kubectl, "kustomize", directory)) if one]


def job_of(objects: Sequence[Mapping[str, Any]]) -> str:
    """The name of the Job that migrates."""
    [name] = [one["metadata"]["name"] for one in objects if one["kind"] == "Job"]
    return str(name)


def deploy(kubectl: str, overlay: str, image: Image | None, migration_wait: int, rollout_wait: int) -> None:
    """Applies it all, in order. Raises DeployError."""
    before = render(kubectl, overlay, _BEFORE, image)
    migrations = job_of(before)
    job(kubectl, "forget-failed", migrations)
    apply(kubectl, before)
    job(kubectl, "wait", migrations, str(migration_wait))
    after = render(kubectl, overlay, _AFTER, image)
    apply(kubectl, after)
    for one in (*before, *after):
        if workload := _WORKLOADS.get(one["kind"]):
            name = f"{workload}/{one['metadata']['name']}"
            run(kubectl, "--namespace", NAMESPACE, "rollout", "status", name, f"--timeout={rollout_wait}s")


def load(context: str, image: Image) -> None:
    """Brings an image of this machine to a cluster that pulls it from nowhere. Raises DeployError."""
    reference = f"{image.name}:{image.tag}"
    if context.startswith("kind-"):
        run("kind", "load", "docker-image", reference, "--name", context.removeprefix("kind-"))
    elif context == "minikube":
        run("minikube", "image", "load", reference)


def apply(kubectl: str, objects: Sequence[Mapping[str, Any]]) -> None:
    """Applies objects. Raises DeployError."""
    run(kubectl, "apply", "--filename", "-", text=yaml.safe_dump_all(objects))


def job(kubectl: str, verb: str, name: str, *more: str) -> None:
    """Runs a verb of job.sh. Raises DeployError if it fails."""
    command = [str(HERE / "job.sh"), verb, NAMESPACE, name, *more]
    run(*command, environment={**os.environ, "KUBECTL": kubectl})


def run(*command: str, text: str | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command whose output is the reader's. Raises DeployError if it fails."""
    sys.stdout.flush()
    try:
        done = subprocess.run(command, input=text, text=True, env=environment, check=False)  # noqa: S603 - our own
    except FileNotFoundError:
        raise DeployError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        raise DeployError(f"{Path(command[0]).name} {' '.join(command[1:3])} ended with {done.returncode}")


def output(*command: str) -> str:
    """What a command prints. Raises DeployError with its complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode != 0:
        raise DeployError(done.stderr.strip().removeprefix("error: "))
    return done.stdout


def find_kubectl() -> str:
    """That beside this Python, from the wheel; else that on PATH. Raises DeployError."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        raise DeployError("kubectl is not installed")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 rolled out, 1 not, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m deploy.apply", description=(__doc__ or "").partition("\n")[0])
    names = sorted(path.parent.name for path in OVERLAYS.glob("[a-z]*/kustomization.yaml"))
    parser.add_argument("--overlay", choices=names, help="which to apply [that of kubectl's context]")
    parser.add_argument("--image", type=Image.parse, help="NAME:TAG, loaded into kind or minikube [the overlay's]")
    parser.add_argument("--migration-wait", type=int, default=900, help="seconds for the migrations [%(default)s]")
    parser.add_argument("--rollout-wait", type=int, default=600, help="seconds for each rollout [%(default)s]")
    asked = parser.parse_args(arguments)
    try:
        kubectl = find_kubectl()
        context = output(kubectl, "config", "current-context").strip()
        overlay = asked.overlay or overlay_of(context)
        print(f"deploying {overlay} to the context {context}")
        if asked.image is not None:
            load(context, asked.image)
        deploy(kubectl, overlay, asked.image, asked.migration_wait, asked.rollout_wait)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("rolled out")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
