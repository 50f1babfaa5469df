"""What the manifests ask for is in force in the running pods, and their probes tell the truth."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.containers.cluster import Cluster
from tests.containers.docker import Docker
from tests.containers.pods import Pod
from tests.containers.probes import ask_grpc
from tests.e2e.containers import ContainersDriver
from tests.e2e.steps import Site

_APPS = ("user-service", "notification-service", "mail-catcher", "console")
_SERVICES = _APPS[:2]
_HEALTH = 8080


def _cluster(site: Site) -> Cluster:
    assert isinstance(site.driver, ContainersDriver)
    return site.driver.cluster


def _pods(site: Site, app: str) -> list[Pod]:
    return [pod for pod in _cluster(site).every_pod() if pod.labels.get("app.kubernetes.io/name") == app]


@pytest.mark.parametrize("app", _APPS)
async def test_processes_may_do_nothing(site: Site, app: str) -> None:
    for pod in _pods(site, app):
        _, text = await pod.execute("cat", "/proc/1/status")
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        assert status["Uid"].split() == ["65532"] * 4
        assert status["Gid"].split() == ["65532"] * 4
        assert {status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("app", _APPS)
async def test_only_volumes_can_be_written(site: Site, app: str) -> None:
    for pod in _pods(site, app):
        folders = {"/", "/opt/tidings", "/var/tmp", "/etc", "/tmp"}
        writable = set()
        for folder in folders:
            code, _ = await pod.execute("sh", "-c", f"touch {folder}/probe")
            writable |= {folder} if code == 0 else set()
        mounts = {mount["mountPath"] for mount in pod.spec["containers"][0].get("volumeMounts", [])}
        assert writable == folders & mounts


@pytest.mark.parametrize("app", _APPS)
async def test_memory_is_limited(docker: Docker, site: Site, app: str) -> None:
    for pod in _pods(site, app):
        limit = pod.spec["containers"][0]["resources"]["limits"]["memory"]
        [state] = json.loads(await docker("inspect", pod.container))
        assert state["HostConfig"]["Memory"] == int(limit.removesuffix("Mi")) << 20


async def test_secrets_are_read_by_their_pod_alone(site: Site) -> None:
    [pod, *_] = _pods(site, "user-service")
    _, listed = await pod.execute("stat", "-L", "-c", "%u %g %a", "/etc/tidings/tls/tls.key")
    assert listed.split() == ["0", "65532", "440"]


@pytest.mark.parametrize(("app", "port"), [("user-service", 50051), ("notification-service", 50052)])
async def test_nothing_but_health_is_served_in_the_clear(site: Site, app: str, port: int) -> None:
    for pod in _pods(site, app):
        for name in ("liveness", "readiness", "startup"):
            assert await ask_grpc(f"{pod.address}:{_HEALTH}", name, 5.0) is None
        assert str(await ask_grpc(f"{pod.address}:{port}", "readiness", 5.0)).startswith("UNAVAILABLE")


async def test_without_a_database_pods_are_unready_but_live(site: Site) -> None:
    restarts = {pod.name: pod.restarts for app in _SERVICES for pod in _pods(site, app)}
    _cluster(site).scale("postgres", 0, "StatefulSet")

    async def all_unready() -> str | None:
        ready = [name for app in _SERVICES for name in await site.driver.ready(app)]
        return f"ready: {ready}" if ready else None

    await site.wait("services without a database to be unready", all_unready, 60)
    for app in _SERVICES:
        for pod in _pods(site, app):
            assert await ask_grpc(f"{pod.address}:{_HEALTH}", "readiness", 5.0) == "NOT_SERVING"
            assert await ask_grpc(f"{pod.address}:{_HEALTH}", "liveness", 5.0) is None
    # On the same volume.
    _cluster(site).scale("postgres", 1, "StatefulSet")
    await site.rolled_out(kind="StatefulSet", apps=("postgres",), within=120)
    await site.rolled_out(apps=_SERVICES, within=120)
    assert {pod.name: pod.restarts for app in _SERVICES for pod in _pods(site, app)} == restarts
    await site.create_user()


@pytest.mark.parametrize("app", _APPS)
async def test_sigterm_ends_a_pod_cleanly(site: Site, app: str) -> None:
    """Exit code 0 within its grace; its Deployment then has another."""
    [pod, *_] = _pods(site, app)
    await asyncio.wait_for(pod.delete(), 90)
    assert pod.exit_code == 0
    await site.rolled_out(apps=(app,), within=120)
