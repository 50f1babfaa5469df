"""Every step of tests/e2e, on containers."""

from __future__ import annotations

import pytest

from tests.e2e.steps import NEEDED, STEPS, Site


# The steps that bring the site up have run when it is there.
@pytest.mark.parametrize("name", [name for name in STEPS if name not in NEEDED])
async def test_step(site: Site, name: str) -> None:
    await STEPS[name](site)
