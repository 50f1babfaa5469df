"""One run: start everything, let the storm rage, keep still twice, end everything, and gather what was written down."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import devstack.child
from tests.faultrun.command import Settings
from tests.faults import plan, probes, site, stuck
from tests.faults.journal import Journal
from tests.faults.kinds import POSTGRES_FAULTS, REPLICA_FAULTS, Blow
from tests.faults.site import GivenUpError, Site
from tests.harness.process import clean_environment
from tests.proof.exercise import ALL_REPLICAS
from tests.proof.records import Calm, Fault, Head

_CALM = 6.0
_LULL = 2.5
_MOST_LAG = 0.5
# How long the last answers and the readers on their way to the head are waited for. A broken service may keep them from
# it for ever, which is soon seen.
_LAST, _LAST_IF_BROKEN = 90.0, 30.0


def _kept(settings: Settings) -> float:
    """How long events are kept where old ones are removed: not for long, but so long that somebody receives each
    before, whatever is out of order.
    """
    return min(max(10.0, settings.seconds / 10), 60.0)


def _patience(settings: Settings) -> float:
    """How long the end of the run may take at each step."""
    return _LAST_IF_BROKEN if settings.broken else _LAST


class Part:
    """A process of the run that is commanded by lines; each command is answered by a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._talking = asyncio.Lock()

    async def ask(self, command: str, timeout: float = 60.0) -> str:
        """Commands and returns the answer."""
        assert self._process.stdin is not None
        async with self._talking:
            self._process.stdin.write(f"{command}\n".encode())
            return await self.line(timeout)

    async def line(self, timeout: float = 60.0) -> str:
        """The next line it says."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout):
            said = (await self._process.stdout.readline()).decode().strip()
        if not said:
            raise RuntimeError(f"a part of the run ended by itself, with {await self._process.wait()}")
        return said


@asynccontextmanager
async def part(module: str, *arguments: str) -> AsyncIterator[Part]:
    """A process that dies with this one, and at the end of the context."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-E", str(Path(devstack.child.__file__)), str(os.getpid()),
        sys.executable, "-m", module, *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )  # fmt: skip
    try:
        yield Part(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run(settings: Settings) -> dict[str, object]:
    """Runs and writes every record to the directory. Returns what is worth telling besides."""
    settings.directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(settings.directory / "run.jsonl")
    try:
        async with AsyncExitStack() as stack:
            made = await stack.enter_async_context(
                site.opened(settings.replicas, journal, settings.broken, _kept(settings))
            )
            common = (
                "--addresses", ",".join(made.addresses),
                "--directory", str(settings.directory),
                "--seed", str(settings.seed),
            )  # fmt: skip
            readers = await stack.enter_async_context(part("tests.faults.readers", *common))
            writers = await stack.enter_async_context(
                part("tests.faults.writers", *common, "--callers", str(settings.callers))
            )
            stack.callback(_keep_log, made, settings.directory)
            try:
                await _storm(settings, made, writers)
                await _end(settings, made, writers, readers)
            except (GivenUpError, TimeoutError) as error:
                return {"ended early": str(error) or "a part of the run did not answer", **_notes(settings, made)}
            return _notes(settings, made)
    finally:
        journal.close()


def _keep_log(made: Site, directory: Path) -> None:
    shutil.copy(made.postgres.log_path, directory / "postgres.log")


async def _storm(settings: Settings, made: Site, writers: Part) -> None:
    """Faults in all lanes, with a calm in the middle if there is time for it."""
    chance = random.Random(f"{settings.seed} storm")
    spans = 2 if settings.seconds >= 120 else 1
    hits: Counter[str] = Counter()
    replicas = range(len(made.replicas))
    lanes = [plan.replica_lane(settings.seed, number, len(made.replicas)) for number in replicas]
    lane_of_postgres = plan.postgres_lane(settings.seed)
    for span in range(spans):
        settings.say(f"storm {span + 1} of {spans}")
        rages = partial(_rages, hits, time.monotonic(), settings.seconds / spans, settings.hits * (span + 1) / spans)
        tasks = [asyncio.create_task(_lane(made, lane, number, rages, hits)) for number, lane in enumerate(lanes)]
        tasks.append(asyncio.create_task(_postgres_lane(made, lane_of_postgres, rages, hits)))
        await _all(tasks)
        await made.calm()
        settings.say("calm")
        await _keep_still(made, writers)
        await stuck.trial(made, chance, settings.directory / f"stuck-{span}.jsonl")
        await writers.ask("go")


async def _all(tasks: list[asyncio.Task[None]]) -> None:
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_Rages = Callable[[Collection[str]], bool]


def _rages(hits: Counter[str], begun: float, length: float, wanted: float, kinds: Collection[str]) -> bool:
    """Whether a lane of these kinds goes on."""
    spent = time.monotonic() - begun
    return spent < length or (spent < 2 * length and min(hits[kind] for kind in kinds) < wanted)


async def _lane(made: Site, steps: Iterator[plan.Step], number: int, rages: _Rages, hits: Counter[str]) -> None:
    replica = made.replicas[number]
    while rages(REPLICA_FAULTS):
        step = next(steps)
        async with replica.lock:
            await replica.revive()
            await _strike(made, step, number, number, hits)
        await asyncio.sleep(step.rest)


async def _postgres_lane(made: Site, steps: Iterator[plan.Step], rages: _Rages, hits: Counter[str]) -> None:
    while rages(POSTGRES_FAULTS):
        step = next(steps)
        await asyncio.sleep(step.rest)
        await _strike(made, step, random.Random(step.seed).randrange(len(made.replicas)), ALL_REPLICAS, hits)


async def _strike(made: Site, step: plan.Step, number: int, struck: int, hits: Counter[str]) -> None:
    blow = Blow()
    strike = (REPLICA_FAULTS | POSTGRES_FAULTS)[step.kind]
    await strike(made, made.replicas[number], random.Random(step.seed), blow)
    # A fault that waited in vain for its instant is told with its miss.
    hit = blow.hit if blow.at else False
    hits[step.kind] += hit is not False
    made.journal.note(Fault(step.kind, struck, blow.at or time.monotonic(), time.monotonic(), hit))


async def _keep_still(made: Site, writers: Part) -> None:
    """Nobody does anything for a while. A while in which this process itself had no turn does not count."""
    await writers.ask("pause")
    for _ in range(3):
        await asyncio.sleep(_LULL)
        begun, most = time.monotonic(), 0.0
        while (now := time.monotonic()) < begun + _CALM and most < _MOST_LAG:
            await asyncio.sleep(0.05)
            most = max(most, time.monotonic() - now - 0.05)
        if most < _MOST_LAG:
            made.journal.note(Calm(begun, time.monotonic()))
            return


async def _end(settings: Settings, made: Site, writers: Part, readers: Part) -> None:
    settings.say("every change is settled")
    await writers.ask("stop")
    assert await writers.line(_patience(settings)) == "settled"
    settings.say("every replica is started anew; readers come to the head")
    for replica in made.replicas:
        async with replica.lock:
            await replica.process.stop()
            await replica.revive()
    for record in await probes.tables(made.database):
        made.journal.note(record)
        head = record.head if isinstance(record, Head) else 0
    await readers.ask(f"finish {head}")
    try:
        said = await readers.line(_patience(settings))
    except TimeoutError:
        await readers.ask("give-up")
        said = await readers.line()
    assert said == "finished", said
    settings.say("old tokens and forged ones are tried")
    await probes.try_tokens(made, settings.directory, settings.seed)
    # Meanwhile old events were removed.
    made.journal.note((await probes.tables(made.database))[-1])


def _notes(settings: Settings, made: Site) -> dict[str, object]:
    errors = [
        record
        for replica in made.replicas
        for record in replica.process.records
        # gRPC tells of every stream whose reader is gone.
        if record.get("level") in ("error", "critical") and "ExecuteBatchError" not in record["event"]
    ]
    (settings.directory / "errors.json").write_text(json.dumps(errors, indent=1))
    return {
        "errors logged by the service": len(errors),
        "replicas that ended by themselves": sum(len(replica.deaths) for replica in made.replicas),
    }
