"""The overlays, rendered once for a session."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.manifests.objects import OVERLAYS, Objects, copied, render


@pytest.fixture(scope="session")
def deploy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ with secrets."""
    return copied(tmp_path_factory.mktemp("manifests"))


@pytest.fixture(scope="session")
def rendered(deploy_folder: Path) -> dict[str, Objects]:
    """The objects of each overlay. Not to be changed: `overlays` has copies."""
    return {name: render(deploy_folder / "overlays" / name) for name in OVERLAYS}


@pytest.fixture
def overlays(rendered: dict[str, Objects]) -> dict[str, Objects]:
    """The objects of each overlay, for one test."""
    return copy.deepcopy(rendered)
