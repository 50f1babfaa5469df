"""The fault run in short: an honest service keeps its promises, a broken one is found out by the promise's name."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.broken import SWITCHES
from tests.faults.kinds import POSTGRES_FAULTS, REPLICA_FAULTS
from tests.faults.plan import postgres_lane, replica_lane
from tests.faults.report import BROKEN, NOT_EXERCISED
from tests.harness.process import clean_environment
from tests.proof.promises import CHECKS

_SECONDS = 8
_LANES = 3


async def _run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Its exit code and what it wrote as JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults",
        "--seed", "1", "--seconds", str(_SECONDS), "--json", str(path), *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=clean_environment(),
    )  # fmt: skip
    output, _ = await process.communicate()
    assert path.exists(), output.decode()
    result: dict[str, Any] = json.loads(path.read_text())
    assert process.returncode is not None
    return process.returncode, result


@pytest.mark.timeout(400)
async def test_a_short_run_breaks_no_promise(tmp_path: Path) -> None:
    code, result = await _run(tmp_path / "result.json")
    checked = {verdict["promise"]: verdict["checked"] for verdict in result["verdicts"]}
    broken = {verdict["promise"]: verdict["examples"] for verdict in result["verdicts"] if verdict["broken"]}
    assert broken == {}
    # How often each fault hits in so short a time is up to the machine.
    assert (code == NOT_EXERCISED) == bool(result["missed"])
    assert checked.keys() == CHECKS.keys()
    assert result["events"] > 1000


# The other switches: `python -m tests.faults --broken all`; what each check finds is in tests/proof.
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["drops"])
async def test_a_broken_service_is_found_out(tmp_path: Path, name: str) -> None:
    code, result = await _run(tmp_path / "result.json", "--broken", name)
    assert code == BROKEN
    assert SWITCHES[name].promise in {verdict["promise"] for verdict in result["verdicts"] if verdict["broken"]}


def test_every_promise_has_a_switch_that_breaks_it() -> None:
    assert {switch.promise for switch in SWITCHES.values()} == CHECKS.keys()


def test_the_plan_follows_from_the_seed_and_gives_each_kind_its_share() -> None:
    def plan(seed: int, count: int) -> list[list[str]]:
        lanes = [replica_lane(seed, lane, _LANES) for lane in range(_LANES)]
        return [[next(lane).kind for _ in range(count)] for lane in lanes]

    rounds = 4
    kinds = len(REPLICA_FAULTS)
    assert plan(1, 10) == plan(1, 10) != plan(2, 10)
    drawn = [kind for lane in plan(1, rounds * kinds) for kind in lane]
    assert {drawn.count(kind) for kind in REPLICA_FAULTS} == {rounds * _LANES}
    lane = postgres_lane(1)
    assert {next(lane).kind for _ in POSTGRES_FAULTS} == POSTGRES_FAULTS.keys()
