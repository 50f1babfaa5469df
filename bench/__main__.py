"""`python -m bench [creation] [latency]`: prints `name: value unit [spread]` lines and writes JSON to
bench/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
from collections.abc import AsyncIterator
from pathlib import Path

from bench import creation, latency
from bench.measure import Value, write
from bench.stack import Stack

_RESULTS = Path(__file__).parent / "results"
_NAMES = ("creation", "latency")


def _benchmark(name: str, stack: Stack, quick: bool) -> AsyncIterator[Value]:
    if name == "creation":
        return creation.run(stack, *((3, 2, 3) if quick else (5, 5, 60)))
    return latency.run(stack, *((1, 3) if quick else (3, 10)))


async def _run(names: list[str], quick: bool) -> None:
    for name in names:
        stack = await Stack.open()
        values = []
        try:
            async for value in _benchmark(name, stack, quick):
                print(value, flush=True)
                values.append(value)
        finally:
            await stack.close()
        write(_RESULTS / f"{name}.json", values)


def main() -> None:
    """Runs the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(_NAMES)}; all unless named")
    parser.add_argument("--quick", action="store_true", help="few short rounds: to see that it runs, not to quote")
    asked = parser.parse_args()
    for name in asked.names:
        if name not in _NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(_NAMES)}")
    print(f"# {platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} processors")
    asyncio.run(_run(asked.names or list(_NAMES), asked.quick))


if __name__ == "__main__":
    main()
