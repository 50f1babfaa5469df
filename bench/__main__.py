"""The benchmarks: prints `name: value unit [spread]` lines and writes JSON to bench/results/."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from bench import creation, crowd, deliveries, fanout, importing, inbox, latency, replay, resumption, tracing
from bench.measure import Sizes, write
from bench.stack import Stack

_RESULTS = Path(__file__).parent / "results"
# Each has `run(stack, sizes)`, which yields values, its usual SIZES and those of a QUICK run.
_BENCHMARKS: Mapping[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (creation, importing, replay, fanout, latency, resumption, crowd, tracing, inbox, deliveries)
}


async def _run(names: list[str], quick: bool, given: Mapping[str, int]) -> None:
    for name in names:
        benchmark = _BENCHMARKS[name]
        sizes: Sizes = dataclasses.replace(benchmark.QUICK if quick else benchmark.SIZES, **given)
        print(f"# {name}: {sizes}", flush=True)
        stack = await Stack.open()
        values = []
        try:
            async for value in benchmark.run(stack, sizes):
                print(value, flush=True)
                values.append(value)
        finally:
            await stack.close()
        write(_RESULTS / f"{name}.json", values)


def main() -> None:
    """Runs the named benchmarks, or all."""
    about = [f"  {name:10} {str(module.__doc__).partition(chr(10))[0]}" for name, module in _BENCHMARKS.items()]
    usual = [f"  {name:10} {module.SIZES}, quick: {module.QUICK}" for name, module in _BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="\n".join(["benchmarks:", *about, "", "sizes:", *usual]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(_BENCHMARKS)}; all unless named")
    parser.add_argument("--quick", action="store_true", help="few short rounds: to see that it runs, not to quote")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, metavar="N", help=f"{field.name}, instead of the usual number")
    asked = parser.parse_args()
    for name in asked.names:
        if name not in _BENCHMARKS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(_BENCHMARKS)}")
    given = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Sizes)}
    print(f"# {platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} processors")
    asyncio.run(
        _run(
            asked.names or list(_BENCHMARKS),
            asked.quick,
            {name: size for name, size in given.items() if size is not None},
        )
    )


if __name__ == "__main__":
    main()
