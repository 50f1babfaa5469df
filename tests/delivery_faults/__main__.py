"""`python -m tests.delivery_faults`: breaks what deliveries depend on and prints promise by promise what was checked.

Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong arguments, 3 the run was not exercised enough to tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.delivery_faults import broken, evidence
from tests.delivery_faults.report import Report, report, show
from tests.delivery_faults.run import Settings, run
from tests.faults.report import BROKEN, KEPT, wanted_hits

# Long enough for every switch to show.
_BROKEN_SECONDS = 15.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.delivery_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fault switches:\n" + "\n".join(
            f"  {switch.name:<12} breaks {switch.promise}: {switch.what}" for switch in broken.SWITCHES.values()
        ),
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="what is done to whom follows from it; drawn and printed by default")
    parser.add_argument(
        "--seconds", type=float, help=f"how long the storm rages (300; {_BROKEN_SECONDS:g} if --broken)"
    )
    parser.add_argument("--replicas", type=int, default=2, help="replicas of the notification service (2)")
    parser.add_argument("--callers", type=int, default=4, help="callers that change users at the same time (4)")
    parser.add_argument("--broken", metavar="NAME", choices=[*broken.SWITCHES, "all"], help="runs a broken service")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the result there too")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keeps journals and logs of the run there")
    return parser.parse_args()


def _once(asked: argparse.Namespace, console: Console, seed: int, seconds: float, switch: str | None) -> Report:
    directory = Path(asked.keep or tempfile.mkdtemp(prefix="tidings-faults-")).absolute()
    if switch and asked.keep:
        directory /= switch
    if directory.exists() and any(directory.glob("*.jsonl")):
        raise SystemExit(f"error: {directory} holds the records of another run")

    def say(what: str) -> None:
        console.print(f"{what} …", style="dim", highlight=False)

    settings = Settings(seed, seconds, wanted_hits(seconds), directory, asked.replicas, asked.callers, switch, say)
    try:
        found = asyncio.run(run(settings))
        if asked.keep:
            evidence.keep(found, directory / "evidence.json")
        say("judging")
        return report(found, seed, seconds)
    finally:
        if not asked.keep:
            shutil.rmtree(directory, ignore_errors=True)


def _all_broken(asked: argparse.Namespace, console: Console, seed: int, seconds: float) -> int:
    """Runs every switch; 0 if each was found by its promise."""
    table = Table("switch", "breaks", "found", "broken promises", box=None, pad_edge=False)
    found = []
    for switch in broken.SWITCHES.values():
        console.print(f"{switch.name}: {switch.what}", highlight=False)
        result = _once(asked, console, seed, seconds, switch.name)
        found.append(switch.promise in result.broken)
        told = "yes" if found[-1] else "NO", ", ".join(result.broken)
        console.print(f"  found by {switch.promise}: {told[0]}; broken: {told[1]}", highlight=False)
        table.add_row(switch.name, switch.promise, *told)
    console.print(table)
    return KEPT if all(found) else BROKEN


def _terminated(signum: int, _: object) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    """Runs; returns the exit code."""
    asked = _arguments()
    # Everything that was started is ended also then.
    signal.signal(signal.SIGTERM, _terminated)
    console = Console(soft_wrap=True)
    seed = random.SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    seconds = asked.seconds or (_BROKEN_SECONDS if asked.broken else 300.0)
    console.print(f"seed {seed}", highlight=False)
    if asked.broken == "all":
        return _all_broken(asked, console, seed, seconds)
    result = _once(asked, console, seed, seconds, asked.broken)
    show(result, console)
    if asked.json:
        asked.json.write_text(json.dumps(result.as_dict(), indent=2))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
