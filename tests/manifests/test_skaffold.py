"""skaffold.yaml: what it promises of order and gates, and that its paths are there; skaffold itself where it is."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.objects import ROOT

Config = dict[str, Any]

# What skaffold 2.19 brought: https://skaffold.dev/docs/references/yaml/
_SCHEMA = "skaffold/v4beta14"
_MODULES = {"infra": [], "schema": ["infra"], "services": ["schema"]}
_PROFILES = {
    "infra": {"kind", "minikube", "dev", "production"},
    "schema": {"kind", "minikube", "production"},
    "services": {"kind", "minikube", "dev", "production"},
}
_FORWARDED = {
    "user-service": 50051,
    "notification-service": 50052,
    "notification-pages": 8090,
    "console": 8080,
    "grafana": 3000,
    "prometheus": 9090,
    "jaeger": 16686,
}
_ACTIVATED_BY = {
    "kind": [{"kubeContext": "kind-.*"}],
    "minikube": [{"kubeContext": "minikube"}],
    "dev": [{"command": "dev"}],
    "production": None,
}


def load() -> list[Config]:
    """The modules."""
    return list(yaml.safe_load_all((ROOT / "skaffold.yaml").read_text()))


def _profiles(config: Config) -> dict[str, Config]:
    return {one["name"]: one for one in config["profiles"]}


def order(configs: Sequence[Config]) -> Iterator[str]:
    """Three modules, each of which requires the one before it."""
    found = {
        one["metadata"]["name"]: [name for needs in one.get("requires", ()) for name in needs["configs"]]
        for one in configs
    }
    if found != _MODULES:
        yield f"the modules are {found}"
    for one in configs:
        if one["apiVersion"] != _SCHEMA:
            yield f"{one['metadata']['name']}: is of {one['apiVersion']}"


def gate(configs: Sequence[Config]) -> Iterator[str]:
    """The schema's Job replaces one of another image, is forgotten if it has failed, and is waited for."""
    kubectl = configs[1]["deploy"]["kubectl"]
    if kubectl.get("flags", {}).get("apply") != ["--force"]:
        yield "a Job of another image is refused"
    [forget], [wait] = (
        [hook["host"] for hook in kubectl.get("hooks", {}).get(when, [{"host": {"command": [], "dir": ""}}])]
        for when in ("before", "after")
    )
    job = ["tidings", "migrations"]
    if forget["command"] != ["sh", "deploy/job.sh", "forget-failed", *job] or forget["dir"] != ".":
        yield "a Job that has failed is not forgotten"
    if wait["command"][:-1] != ["sh", "deploy/job.sh", "wait", *job] or wait["dir"] != ".":
        yield "nothing waits for the Job"


def profiles(configs: Sequence[Config]) -> Iterator[str]:
    """Clusters are known by their contexts; production is rendered as it is applied, and never deployed."""
    for one in configs:
        name, found = one["metadata"]["name"], _profiles(one)
        if set(found) != _PROFILES[name]:
            yield f"{name}: has the profiles {sorted(found)}"
            continue
        for profile, config in found.items():
            if config.get("activation") != _ACTIVATED_BY[profile]:
                yield f"{name}/{profile}: is activated by {config.get('activation')}"
            folder = f"deploy/overlays/{profile}/{name}"
            if profile != "production" and config["manifests"] != {"kustomize": {"paths": [folder]}}:
                yield f"{name}/{profile}: is not that of {folder}"
        production = found["production"]
        [before] = production["deploy"]["kubectl"]["hooks"]["before"]
        if "exit 1" not in before["host"]["command"][-1]:
            yield f"{name}/production: can be deployed"
    whole = [_profiles(one)["production"].get("manifests") for one in configs]
    if whole != [{"kustomize": {"paths": ["deploy/overlays/production"]}}, None, None]:
        yield f"production is rendered of {whole}"
    removed = [[patch["path"] for patch in _profiles(one)["production"]["patches"]] for one in configs]
    if removed != [["/build"], ["/manifests"], ["/manifests"]]:
        yield f"production leaves out {removed}"


def development(configs: Sequence[Config]) -> Iterator[str]:
    """Files are copied to where the pods of `dev` look first; changed migrations are a new image."""
    [artifact] = configs[0]["build"]["artifacts"]
    if [one["command"] for one in artifact.get("hooks", {}).get("before", ())] != [["make", "deploy-secrets"]]:
        yield "a machine that has not deployed before has no secrets"
    for rule in artifact["sync"]["manual"]:
        folder = rule["src"].partition("/**")[0]
        if not (ROOT / folder).is_dir() or rule["strip"] != "services/" or rule["dest"] != "/src":
            yield f"{rule['src']}: is not copied to its place"
        if folder.startswith("migrations"):
            yield "a changed migration does not run"
    forwarded = {one["resourceName"]: one["port"] for config in configs for one in config.get("portForward", ())}
    if forwarded != _FORWARDED:
        yield f"forwards {forwarded}"


def verify(configs: Sequence[Config]) -> Iterator[str]:
    """The smoke test runs in the cluster, by the Job's manifest, with the same container and arguments."""
    [test] = configs[2]["verify"]
    path = test["executionMode"]["kubernetesCluster"]["jobManifestPath"]
    [container] = yaml.safe_load((ROOT / path).read_text())["spec"]["template"]["spec"]["containers"]
    # skaffold puts its own name, image and arguments into the container of this name.
    same = {key: test["container"].get(key) for key in ("name", "args")}
    if same != {key: container[key] for key in ("name", "args")}:
        yield f"{path} runs something else"
    if test["container"]["image"] != configs[0]["build"]["artifacts"][0]["image"]:
        yield "it is not the image that was built"


def paths(configs: Sequence[Config]) -> Iterator[str]:
    """Every path is there."""
    for path in _paths(configs):
        if not (ROOT / path).exists():
            yield f"there is no {path}"


def _paths(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for key, one in value.items():
                if key in {"dockerfile", "context", "jobManifestPath", "dir"}:
                    yield one
                elif key == "paths":
                    yield from one
                else:
                    yield from _paths(one)
        case list():
            for one in value:
                yield from _paths(one)
        case str() if re.fullmatch(r"deploy/[\w./-]+", value):
            yield value


RULES = (order, gate, profiles, development, verify, paths)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_promise_is_kept(rule: Any) -> None:
    assert list(rule(load())) == []


def _broken(*path: Any, value: Any) -> list[Config]:
    configs: Any = copy.deepcopy(load())
    place = configs
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return list(configs)


@pytest.mark.parametrize(
    ("rule", "configs"),
    [
        (order, _broken(2, "requires", value=[])),
        (order, _broken(0, "apiVersion", value="skaffold/v4beta7")),
        (gate, _broken(1, "deploy", "kubectl", "flags", value={})),
        (gate, _broken(1, "deploy", "kubectl", "hooks", "after", 0, "host", "command", 2, value="forget-failed")),
        (gate, _broken(1, "deploy", "kubectl", "hooks", value={})),
        (profiles, _broken(0, "profiles", 0, "activation", value=[{"kubeContext": "kind"}])),
        (
            profiles,
            _broken(1, "profiles", 1, "manifests", "kustomize", "paths", 0, value="deploy/overlays/kind/schema"),
        ),
        (
            profiles,
            _broken(2, "profiles", 3, "deploy", "kubectl", "hooks", "before", 0, "host", "command", value=["true"]),
        ),
        (profiles, _broken(2, "profiles", 3, "patches", value=[])),
        (development, _broken(0, "build", "artifacts", 0, "sync", "manual", 0, "dest", value="/opt")),
        (development, _broken(0, "build", "artifacts", 0, "hooks", value={})),
        (development, _broken(2, "portForward", value=[])),
        (development, _broken(0, "portForward", 0, "port", value=3001)),
        (verify, _broken(2, "verify", 0, "container", "args", value=["tidings.cli", "doctor"])),
        (paths, _broken(0, "build", "artifacts", 0, "docker", "dockerfile", value="Dockerfle")),
        (paths, _broken(1, "deploy", "kubectl", "hooks", "after", 0, "host", "command", 1, value="deploy/jobs.sh")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_each_promise_can_be_broken(rule: Any, configs: list[Config]) -> None:
    assert list(rule(configs))


@pytest.mark.skipif(shutil.which("skaffold") is None, reason="skaffold is not installed: neither diagnose nor render")
@pytest.mark.parametrize("profile", ["kind", "minikube", "production"])
def test_skaffold_itself_reads_and_renders_it(deploy_folder: Path, profile: str) -> None:
    root = deploy_folder.parent
    for name in ("skaffold.yaml", "Dockerfile"):
        shutil.copy(ROOT / name, root / name)
    for command in (
        ["diagnose", "--yaml-only"],
        ["render", "--digest-source=tag", "--offline=true", "--output=rendered.yaml"],
    ):
        done = subprocess.run(
            ["skaffold", *command, "--profile", profile], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all((root / "rendered.yaml").read_text()))
