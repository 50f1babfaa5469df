"""`python -m tests.e2e`: the steps against the cluster of the current context, or against containers of Docker.

Exit codes: 0 what was tried passed, 1 a step failed, 2 wrong arguments, 3 nothing can be tried here.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from migrations import runner
from tests.containers.docker import UnavailableError
from tests.containers.site import containers_site
from tests.e2e.driver import UntriedError
from tests.e2e.kubectl import KubectlDriver
from tests.e2e.loading import derived
from tests.e2e.overlay import Overlay
from tests.e2e.steps import STEPS, Site, run

_NAMESPACE = "tidings-e2e"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.e2e",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="steps:\n" + "\n".join(f"  {name:<18} {(step.__doc__ or '').split(':')[0].strip()}"
                                      for name, step in STEPS.items()),
    )  # fmt: skip
    parser.add_argument("--backend", choices=("kubectl", "containers"), default="kubectl", help="what runs the pods")
    parser.add_argument("--overlay", default="kind", help="the folder in deploy/overlays (kind)")
    parser.add_argument("--image", help="NAME:TAG of an image that the cluster has or can pull; containers build one")
    parser.add_argument("--step", action="append", choices=tuple(STEPS), help="only this step, and what it rests on")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@asynccontextmanager
async def _cluster_site(overlay: str, image: str) -> AsyncIterator[Site]:
    driver = KubectlDriver(_NAMESPACE)
    with tempfile.TemporaryDirectory(prefix="tidings-e2e-") as folder:
        rendering = Overlay(Path(folder), overlay, _NAMESPACE)
        context = await driver.open(rendering.render(image))
        _say(f"context {context}, namespace {_NAMESPACE}")
        try:
            yield Site(driver, image, runner.head("users"), rendering.render, partial(derived, context, image), _say)
        finally:
            await driver.close()


async def _main(asked: argparse.Namespace) -> int:
    site = (
        _cluster_site(asked.overlay, asked.image)
        if asked.backend == "kubectl"
        else containers_site(asked.overlay, asked.image, _say)
    )
    try:
        async with site as opened:
            outcomes = await run(opened, tuple(asked.step or ()))
    except (UntriedError, UnavailableError) as error:
        print(f"error: {asked.backend}: {error}", file=sys.stderr)
        print(f"untried: {', '.join(STEPS)}")
        return 3
    for name, (outcome, why) in outcomes.items():
        print(f"{outcome:<8} {name}" + (f": {why.splitlines()[0]}" if why else ""))
    untried = [name for name, (outcome, _) in outcomes.items() if outcome == "untried"]
    print(f"untried: {', '.join(untried) or 'none'}")
    failed = any(outcome == "failed" for outcome, _ in outcomes.values())
    return 1 if failed else 0


async def _stoppable(asked: argparse.Namespace) -> int:
    """SIGTERM ends the run as Ctrl-C does: with everything removed."""
    running = asyncio.ensure_future(_main(asked))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    try:
        return await running
    except asyncio.CancelledError:
        return 130


def main() -> int:
    """Returns the exit code."""
    asked = _arguments()
    if asked.backend == "kubectl" and not asked.image:
        print("error: --image NAME:TAG: which image should the cluster run? make image builds one", file=sys.stderr)
        return 2
    return asyncio.run(_stoppable(asked))


if __name__ == "__main__":
    sys.exit(main())
