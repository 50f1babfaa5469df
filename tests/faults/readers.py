"""The readers, a process of its own: `python -m tests.faults.readers`.

Lines on standard input command: `count`, `finish POSITION` (every session ends once it has come there), `give-up`. Each
is answered by a line: how many events were received, or `finished`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import uvloop

from tests.faults.following import Habit, Progress, Subscriber
from tests.faults.journal import Journal


def habits(replicas: int) -> list[Habit]:
    """Who reads, and how."""
    return [
        *(Habit(f"tail-{replica}", "earliest", replica=replica) for replica in range(replicas)),
        Habit("hop-small", "earliest", max_batch=3, cut=0.004, cut_in_group=0.03),
        Habit("hop-odd", "earliest", max_batch=17, linger=0.05, cut=0.02, cut_in_group=0.1),
        Habit("hop-large", "earliest", cut=0.03, cut_in_group=0.5),
        Habit("slow", "earliest", max_batch=100, cut=0.01, pause=0.4),
        Habit("previous", "earliest", include_previous=True, cut=0.01, cut_in_group=0.2),
        Habit("again", "earliest", max_batch=500, cut=0.02, cut_in_group=0.5, turn=0),
        Habit("now", "now", max_batch=50, turn=20, cut=0.01),
        Habit("since", "since", max_batch=50, turn=10),
        Habit("copy", "snapshot", max_batch=100, cut=0.05, cut_in_group=0.2),
        Habit("copies", "snapshot", max_batch=40, cut=0.05, turn=3),
        # Tokens of these are good for the same selection only.
        Habit("pick-copies", "snapshot", max_batch=20, selection={"labels": {"team": "red"}}, cut=0.05, turn=10),
        Habit("pick-red", "earliest", max_batch=10, selection={"labels": {"team": "red"}}, cut=0.02, cut_in_group=0.1),
        Habit("pick-shard", "earliest", selection={"shard": [1, 3]}, cut=0.02, cut_in_group=0.2),
        Habit("pick-types", "earliest", selection={"types": ["DELETED", "UNDELETED"]}, cut=0.02),
        Habit("pick-fields", "earliest", selection={"changed_fields": ["labels"]}, include_previous=True, cut=0.01),
        Habit("pick-nobody", "now", selection={"labels": {"team": "nobody's"}}),
    ]


async def _command(progress: Progress, finished: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while not finished.is_set():
        command, *values = (await reader.readline()).decode().split() or ["give-up"]
        if command == "finish":
            progress.finish = int(values[0])
        elif command == "give-up":
            progress.give_up()
        print(progress.received, flush=True)


async def _save(journal: Journal) -> None:
    while True:
        await asyncio.sleep(1.0)
        await journal.sure()


async def _read(asked: argparse.Namespace) -> None:
    journal = Journal(Path(asked.directory) / "readers.jsonl")
    progress, finished = Progress(), asyncio.Event()
    addresses = asked.addresses.split(",")
    others = [asyncio.create_task(_command(progress, finished)), asyncio.create_task(_save(journal))]
    async with asyncio.TaskGroup() as tasks:
        for habit in habits(len(addresses)):
            tasks.create_task(Subscriber(habit, addresses, asked.seed, journal, progress).run())
    finished.set()
    for other in others:
        other.cancel()
    await asyncio.wait(others)
    journal.close()
    print("finished", flush=True)


def main() -> None:
    """Reads the arguments and reads until told to finish."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.readers")
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--seed", type=int, required=True)
    uvloop.run(_read(parser.parse_args()))


if __name__ == "__main__":
    main()
