"""The fault run in short: an honest service keeps its promises, a broken one is found out by the promise's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faultrun.report import BROKEN, NOT_EXERCISED
from tests.faultrun.short import broken_promises, run_short
from tests.faults.broken import SWITCHES
from tests.faults.kinds import POSTGRES_FAULTS, REPLICA_FAULTS
from tests.faults.plan import postgres_lane, replica_lane
from tests.proof.promises import CHECKS

_LANES = 3


@pytest.mark.timeout(400)
async def test_a_short_run_breaks_no_promise(tmp_path: Path) -> None:
    code, result = await run_short("tests.faults", tmp_path / "result.json")
    checked = {verdict["promise"]: verdict["checked"] for verdict in result["verdicts"]}
    assert broken_promises(result) == {}
    # How often each fault hits in so short a time is up to the machine.
    assert (code == NOT_EXERCISED) == bool(result["missed"])
    assert checked.keys() == CHECKS.keys()
    assert result["events"] > 1000


# The other switches: `python -m tests.faults --broken all`; what each check finds is in tests/proof.
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["drops"])
async def test_a_broken_service_is_found_out(tmp_path: Path, name: str) -> None:
    code, result = await run_short("tests.faults", tmp_path / "result.json", "--broken", name)
    assert code == BROKEN
    assert SWITCHES[name].promise in broken_promises(result)


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
