"""The command line of a fault run.

Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong arguments, 3 the run was not exercised enough to tell.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faultrun.report import BROKEN, KEPT, RunReport, wanted_hits
from tests.faultrun.switches import Switch


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is asked for. Every kind of fault is to hit work in flight `hits` times; a storm that is slow goes on
    for that, up to twice its time. `broken` names a fault switch of the service; `keep` is whether what was written
    down stays.
    """

    seed: int
    seconds: float
    hits: int
    directory: Path
    replicas: int
    callers: int
    broken: str | None
    keep: bool
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Command:
    """A fault run as a command: `run` does one and judges it. `broken_seconds` is long enough for every switch to show;
    `replicas` and `callers` have the default and what it is the number of.
    """

    module: str
    description: str | None
    run: Callable[[Settings], RunReport]
    switches: Mapping[str, Switch]
    broken_seconds: float
    replicas: tuple[int, str]
    callers: tuple[int, str]
    kept: str


def _arguments(command: Command) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {command.module}",
        description=command.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fault switches:\n" + "\n".join(
            f"  {switch.name:<12} breaks {switch.promise}: {switch.what}" for switch in command.switches.values()
        ),
    )  # fmt: skip
    broken = f"{command.broken_seconds:g}"
    names = [*command.switches, "all"]
    (replicas, of_what), (callers, who) = command.replicas, command.callers
    parser.add_argument("--seed", type=int, help="what is done to whom follows from it; drawn and printed by default")
    parser.add_argument("--seconds", type=float, help=f"how long the storm rages (300; {broken} if --broken)")
    parser.add_argument("--replicas", type=int, default=replicas, help=f"{of_what} ({replicas})")
    parser.add_argument("--callers", type=int, default=callers, help=f"{who} ({callers})")
    parser.add_argument("--broken", metavar="NAME", choices=names, help="runs a broken service")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the result there too")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help=f"keeps {command.kept} of the run there")
    return parser.parse_args()


def _once(
    command: Command, asked: argparse.Namespace, console: Console, seed: int, seconds: float, switch: str | None
) -> RunReport:
    directory = Path(asked.keep or tempfile.mkdtemp(prefix="tidings-faults-")).absolute()
    if switch and asked.keep:
        directory /= switch
    if directory.exists() and any(directory.glob("*.jsonl")):
        raise SystemExit(f"error: {directory} holds the records of another run")

    def say(what: str) -> None:
        console.print(f"{what} …", style="dim", highlight=False)

    try:
        return command.run(
            Settings(
                seed,
                seconds,
                wanted_hits(seconds),
                directory,
                asked.replicas,
                asked.callers,
                switch,
                bool(asked.keep),
                say,
            )
        )
    finally:
        if not asked.keep:
            shutil.rmtree(directory, ignore_errors=True)


def _all_broken(command: Command, asked: argparse.Namespace, console: Console, seed: int, seconds: float) -> int:
    """Runs every switch; 0 if each was found by its promise."""
    table = Table("switch", "breaks", "found", "broken promises", box=None, pad_edge=False)
    found = []
    for switch in command.switches.values():
        console.print(f"{switch.name}: {switch.what}", highlight=False)
        result = _once(command, asked, console, seed, seconds, switch.name)
        found.append(switch.promise in result.broken)
        told = "yes" if found[-1] else "NO", ", ".join(result.broken)
        console.print(f"  found by {switch.promise}: {told[0]}; broken: {told[1]}", highlight=False)
        table.add_row(switch.name, switch.promise, *told)
    console.print(table)
    return KEPT if all(found) else BROKEN


def _terminated(signum: int, _: object) -> None:
    raise SystemExit(128 + signum)


def main(command: Command) -> int:
    """Runs; returns the exit code."""
    asked = _arguments(command)
    # Everything that was started is ended also then.
    signal.signal(signal.SIGTERM, _terminated)
    console = Console(soft_wrap=True)
    seed = random.SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    seconds = asked.seconds or (command.broken_seconds if asked.broken else 300.0)
    console.print(f"seed {seed}", highlight=False)
    if asked.broken == "all":
        return _all_broken(command, asked, console, seed, seconds)
    result = _once(command, asked, console, seed, seconds, asked.broken)
    result.show(console)
    if asked.json:
        asked.json.write_text(json.dumps(result.as_dict(), indent=2))
    return result.exit_code
