"""Everything for a run on containers, made and removed: an engine, images, the overlay, an empty cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from migrations import runner
from tests.containers import bases, cluster
from tests.containers.docker import Docker, engine
from tests.e2e.containers import ContainersDriver
from tests.e2e.driver import Object
from tests.e2e.overlay import Overlay
from tests.e2e.steps import Site

_NAMESPACE = "tidings-e2e"
_IMAGE = ("tidings", "e2e")


@asynccontextmanager
async def folder() -> AsyncIterator[Path]:
    """A folder that other users may pass through, for they read the files that are mounted from it."""
    made = Path(tempfile.mkdtemp(prefix="tidings-containers-"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


@asynccontextmanager
async def site_on(
    docker: Docker, place: Path, overlay: str, image: str, say: Callable[[str], None]
) -> AsyncIterator[Site]:
    """A site for the steps on an engine, with an image that it has."""
    rendering = Overlay(place, overlay, _NAMESPACE)
    stand_ins = {
        wanted: await bases.postgres_image(docker, wanted)
        for wanted in _images(rendering.render(image)) if "/postgres:" in wanted
    }  # fmt: skip
    for wanted, used in stand_ins.items():
        say(f"{wanted} is {used}")

    async def derive(name: str, revision: str, text: str) -> str:
        return await bases.next_release(docker, image, f"{image.rpartition(':')[0]}:e2e-{name}", revision, text)

    async with cluster.opened(docker, place, _NAMESPACE, stand_ins) as opened:
        yield Site(ContainersDriver(opened), image, runner.head("users"), rendering.render, derive, say)


@asynccontextmanager
async def containers_site(overlay: str, image: str | None, say: Callable[[str], None]) -> AsyncIterator[Site]:
    """All of it. Raises UnavailableError where containers cannot be had."""
    async with folder() as place, engine(place) as docker:
        used = image or await bases.tidings_image(docker, *_IMAGE)
        say(f"image {used}, {int(await docker('image', 'inspect', '--format', '{{.Size}}', used)) / 1e6:.0f} MB")
        async with site_on(docker, place, overlay, used, say) as site:
            yield site


def _images(objects: list[Object]) -> set[str]:
    pods = [one["spec"]["template"]["spec"] for one in objects if "template" in one.get("spec", {})]
    return {container["image"] for pod in pods for container in [*pod["containers"], *pod.get("initContainers", [])]}
