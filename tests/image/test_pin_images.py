"""Digests are written where images are named, all or none, and nothing else changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.pin_images import UnansweredError, pin

ROOT = Path(__file__).parents[2]

_DOCKERFILE = """\
# python:3.13 in a comment stays
ARG PYTHON_IMAGE=python:3.13.15-slim-trixie
ARG UV_IMAGE=registry.example:5000/astral/uv:0.13.9@sha256:{old}
ARG VERSION=1.2
FROM ${{PYTHON_IMAGE}}
"""
_YAML = """\
containers:
  - name: one
    image: postgres:18.1-bookworm # why this one
  - image: "registry.example/jaeger:2.1.0"
  - image: tidings:dev
  - image: registry.example/company/tidings:1.0
  - image: unversioned
spec:
  imageName: postgres:18.1-bookworm
"""


def _files(folder: Path) -> tuple[Path, Path]:
    dockerfile, manifest = folder / "Dockerfile", folder / "some.yaml"
    dockerfile.write_text(_DOCKERFILE.format(old="0" * 64))
    manifest.write_text(_YAML)
    return dockerfile, manifest


def test_every_image_but_our_own_gets_the_digest_of_its_tag(tmp_path: Path) -> None:
    dockerfile, manifest = _files(tmp_path)
    asked: list[str] = []

    def digest_of(image: str) -> str:
        asked.append(image)
        return f"sha256:{len(asked):064x}"

    digests = pin((dockerfile, manifest), "tidings", digest_of)
    assert asked == sorted(digests) == [
        "postgres:18.1-bookworm",
        "python:3.13.15-slim-trixie",
        "registry.example/jaeger:2.1.0",
        "registry.example:5000/astral/uv:0.13.9",
    ]  # fmt: skip
    now = dockerfile.read_text() + manifest.read_text()
    for image, digest in digests.items():
        assert f"{image}@{digest}" in now
    assert now.count(digests["postgres:18.1-bookworm"]) == 2
    # Without the digests it is what it was, the one that was pinned before included.
    was = _DOCKERFILE.format(old="0" * 64) + _YAML
    assert re.sub(r"@sha256:[0-9a-f]{64}", "", now) == re.sub(r"@sha256:[0-9a-f]{64}", "", was)


def test_nothing_changes_unless_every_registry_answers(tmp_path: Path) -> None:
    dockerfile, manifest = _files(tmp_path)

    def digest_of(image: str) -> str:
        if "uv" in image:
            raise UnansweredError(image)
        return "sha256:" + "1" * 64

    with pytest.raises(UnansweredError):
        pin((dockerfile, manifest), "tidings", digest_of)
    assert (dockerfile.read_text(), manifest.read_text()) == (_DOCKERFILE.format(old="0" * 64), _YAML)


@pytest.mark.parametrize("client", ["", "skopeo"])
def test_without_a_client_or_an_answer_it_says_so(tmp_path: Path, client: str) -> None:
    dockerfile, _ = _files(tmp_path)
    (tools := tmp_path / "bin").mkdir()
    if client:
        (tools / client).write_text('#!/bin/sh\n[ "$1" = --help ] || { echo "cannot reach it" >&2; exit 1; }\n')
        (tools / client).chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-m", "tools.pin_images", str(dockerfile)],
        cwd=ROOT,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    reason = "skopeo got no digest of it: cannot reach it" if client else "no client of registries"
    assert run.returncode == 1
    assert reason in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.endswith("; nothing was changed\n")
    assert dockerfile.read_text() == _DOCKERFILE.format(old="0" * 64)


def test_the_dockerfile_names_bases_with_exact_tags() -> None:
    named = re.findall(
        r"(?m)^ARG ([A-Z]+_IMAGE)=\S+:\d+\.\d+\.\d+[\w.-]*(?:@sha256:[0-9a-f]{64})?$", (ROOT / "Dockerfile").read_text()
    )
    used = re.findall(r"(?m)^FROM \$\{([A-Z]+_IMAGE)\}", (ROOT / "Dockerfile").read_text())
    assert set(named) == set(used) == {"PYTHON_IMAGE", "UV_IMAGE"}
