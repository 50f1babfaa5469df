"""Images of a next release, made by this machine's Docker and brought to the nodes of a local cluster."""

from __future__ import annotations

import asyncio
import shutil

from tests.containers import bases
from tests.containers.docker import Docker, client
from tests.e2e.driver import FailedError, UntriedError

_TIMEOUT = 300.0


def command(context: str, image: str) -> list[str]:
    """What loads an image into the cluster of a context. Raises UntriedError where nothing does."""
    if context.startswith("kind-"):
        loading = ["kind", "load", "docker-image", image, "--name", context.removeprefix("kind-")]
    elif context == "minikube":
        loading = ["minikube", "image", "load", image]
    else:
        raise UntriedError(f"no image of a next release: the context {context} is neither kind's nor minikube's")
    if shutil.which(loading[0]) is None:
        raise UntriedError(f"no image of a next release: there is no {loading[0]} to load it with")
    return loading


async def derived(context: str, image: str, name: str, revision: str, text: str) -> str:
    """Makes an image of another, with a further revision, and loads it. Raises UntriedError where that cannot be."""
    made = f"{image.rpartition(':')[0]}:e2e-{name}"
    loading = command(context, made)
    docker = Docker(await client())
    if (await docker.run("image", "inspect", image))[0] != 0:
        raise UntriedError(f"no image of a next release: this machine's Docker has no {image}")
    await bases.next_release(docker, image, made, revision, text)
    process = await asyncio.create_subprocess_exec(
        *loading, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(_TIMEOUT):
        output, _ = await process.communicate()
    if process.returncode != 0:
        raise FailedError(f"{' '.join(loading)}: {output.decode(errors='replace').strip()}")
    return made
