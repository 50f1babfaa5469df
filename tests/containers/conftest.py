"""One engine, one image and one cluster for all of these tests, which only `make containers` runs.

A test of what is deployed asks for `site`; the steps of tests/e2e run on it first, for they bring it up.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.containers import bases
from tests.containers.docker import Docker, UnavailableError, engine
from tests.containers.site import folder, site_on
from tests.e2e.steps import NEEDED, STEPS, Site

WANTED = "TIDINGS_TEST_CONTAINERS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what needs an engine unless it was asked for; starting one is no side effect of `make test`."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "docker" in getattr(item, "fixturenames", ()):
            if not os.environ.get(WANTED):
                item.add_marker(pytest.mark.skip(reason="make containers runs these"))
            # Making a base and an image is part of the first test that asks for it.
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
async def place() -> AsyncIterator[Path]:
    """A folder for the run."""
    async with folder() as made:
        yield made


@pytest.fixture(scope="session")
async def docker(place: Path) -> AsyncIterator[Docker]:
    """An engine; where none can be had the tests are skipped, and say why."""
    async with AsyncExitStack() as stack:
        try:
            opened = await stack.enter_async_context(engine(place))
        except UnavailableError as error:
            pytest.skip(f"no containers here: {error}")
        yield opened


@pytest.fixture(scope="session")
async def image(docker: Docker) -> str:
    """Our image, as `make image` builds it."""
    try:
        return await bases.tidings_image(docker, "tidings", "e2e")
    except UnavailableError as error:
        pytest.skip(f"no image here: {error}")


@pytest.fixture(scope="session")
async def empty_site(docker: Docker, image: str, place: Path) -> AsyncIterator[Site]:
    """The overlay for kind, not applied yet."""
    async with site_on(docker, place, "kind", image, lambda text: print(text, flush=True)) as made:
        yield made


@pytest.fixture(scope="session")
async def site(empty_site: Site) -> Site:
    """All of it, deployed and ready."""
    for name in [name for name in STEPS if name in NEEDED]:
        await STEPS[name](empty_site)
    return empty_site
