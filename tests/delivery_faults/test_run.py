"""The deliveries' fault run in short: an honest service keeps its promises, a broken one is found out by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.delivery_faults.broken import SWITCHES
from tests.delivery_faults.promises import CHECKS
from tests.faultrun.report import BROKEN, NOT_EXERCISED
from tests.faultrun.short import broken_promises, run_short


@pytest.mark.timeout(400)
async def test_a_short_run_breaks_no_promise(tmp_path: Path) -> None:
    code, result = await run_short("tests.delivery_faults", tmp_path / "result.json")
    checked = {verdict["promise"]: verdict["checked"] for verdict in result["verdicts"]}
    assert broken_promises(result) == {}
    # How often each fault hits in so short a time is up to the machine.
    assert (code == NOT_EXERCISED) == bool(result["missed"])
    assert checked.keys() == CHECKS.keys()
    assert all(checked.values())
    assert result["deliveries"] > 100


# The other switches: `python -m tests.delivery_faults --broken all`; what each check finds is in test_promises.py.
@pytest.mark.timeout(400)
async def test_a_broken_service_is_found_out(tmp_path: Path) -> None:
    code, result = await run_short("tests.delivery_faults", tmp_path / "result.json", "--broken", "doubts")
    assert code == BROKEN
    assert SWITCHES["doubts"].promise in broken_promises(result)


def test_every_promise_has_a_switch_that_breaks_it() -> None:
    assert {switch.promise for switch in SWITCHES.values()} == CHECKS.keys()
