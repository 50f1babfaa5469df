"""checkov finds nothing in any overlay but what is listed here with its reason, and all that is listed is still found.

It runs in an environment of its own: what it pins would hold back ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.manifests.objects import ROOT, Objects, render

_VERSION = "3.3.30"
_TIMEOUT = 300
# The certificates that a company's proxy is known by, as `make setup` has it.
_ENVIRONMENT = os.environ | ({"UV_SYSTEM_CERTS": "true"} if Path("/etc/ssl/certs/ca-certificates.crt").exists() else {})

_OURS = {"console", "mail-catcher", "migrations", "notification-service", "smoke-test", "user-service"}
_OTHERS = {"grafana", "jaeger", "otel-collector", "postgres", "postgres-exporter", "prometheus"}

# By check: why it is not followed, and by which pods.
EXCEPTIONS = {
    # A limit of processor stops an event loop in the middle of its work while the node is idle.
    "CKV_K8S_11": _OURS | _OTHERS,
    # Tags are exact: an image that is there is the right one, and a registry that is away stops no restart.
    "CKV_K8S_15": _OURS | _OTHERS,
    # libpq and the image of Postgres take passwords from variables; the files there are, are mounted.
    "CKV_K8S_35": {"migrations", "notification-service", "postgres", "user-service"},
    # The number of `postgres` in its image.
    "CKV_K8S_40": {"postgres"},
    # `make pin-images` writes the digests where the registries can be asked.
    "CKV_K8S_43": _OURS | _OTHERS,
}


def _uv() -> str | None:
    own = ROOT / ".uv" / "bin" / "uv"
    return shutil.which("uv") or (str(own) if own.exists() else None)


@pytest.fixture(scope="module")
def checkov() -> list[str]:
    """The command; installed at first. Without a package registry there is none, which CI does not accept."""
    uv = _uv()
    command = [uv or "uv", "tool", "run", "--quiet", "--python", sys.executable, f"checkov=={_VERSION}"]
    installed = uv is not None and (
        subprocess.run(
            [*command, "--version"], env=_ENVIRONMENT, capture_output=True, timeout=_TIMEOUT, check=False
        ).returncode
        == 0
    )
    if not installed:
        reason = f"checkov {_VERSION} cannot be installed here"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    return command


def found(checkov: list[str], folder: Path) -> dict[str, set[str]]:
    """The workloads that each check refuses."""
    done = subprocess.run(
        [*checkov, "--directory", folder, "--framework", "kubernetes", "--compact", "--quiet", "--output", "json"],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 0
    refused = defaultdict(set)
    for one in report["results"]["failed_checks"]:
        name = one["resource"].split(".")[2]
        refused[one["check_id"]].add("migrations" if name.startswith("migrations-") else name)
    return dict(refused)


# uv may have to fetch it first.
@pytest.mark.timeout(2 * _TIMEOUT)
def test_nothing_is_found_but_what_has_its_reason(
    checkov: list[str], overlays: dict[str, Objects], deploy_folder: Path, tmp_path: Path
) -> None:
    overlays["smoke-test"] = render(deploy_folder / "smoke-test")
    for name, objects in overlays.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    assert found(checkov, tmp_path) == EXCEPTIONS


@pytest.mark.timeout(2 * _TIMEOUT)
def test_what_is_wrong_is_found(checkov: list[str], overlays: dict[str, Objects], tmp_path: Path) -> None:
    for one in overlays["kind"]:
        if one["kind"] == "Deployment":
            one["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    (tmp_path / "kind.yaml").write_text(yaml.safe_dump_all(overlays["kind"]))
    assert "user-service" in found(checkov, tmp_path)["CKV_K8S_16"]
