"""The deliveries' fault run in short: an honest service keeps its promises, a broken one is found out by name."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.delivery_faults.broken import SWITCHES
from tests.delivery_faults.promises import CHECKS
from tests.faults.report import BROKEN, NOT_EXERCISED
from tests.harness.process import clean_environment

_SECONDS = 8


async def _run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Its exit code and what it wrote as JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.delivery_faults",
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
    assert all(checked.values())
    assert result["deliveries"] > 100


# The other switches: `python -m tests.delivery_faults --broken all`; what each check finds is in test_promises.py.
@pytest.mark.timeout(400)
async def test_a_broken_service_is_found_out(tmp_path: Path) -> None:
    code, result = await _run(tmp_path / "result.json", "--broken", "doubts")
    assert code == BROKEN
    assert SWITCHES["doubts"].promise in {verdict["promise"] for verdict in result["verdicts"] if verdict["broken"]}


def test_every_promise_has_a_switch_that_breaks_it() -> None:
    assert {switch.promise for switch in SWITCHES.values()} == CHECKS.keys()
