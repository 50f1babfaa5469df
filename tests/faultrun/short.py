"""A fault run in short, as the tests do it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.harness.process import clean_environment

_SECONDS = 8


async def run_short(module: str, path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a run and what it wrote, to a path, as JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "--seed", "1", "--seconds", str(_SECONDS), "--json", str(path), *arguments,
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


def broken_promises(result: dict[str, Any]) -> dict[str, list[str]]:
    """Examples of how each was broken."""
    return {verdict["promise"]: verdict["examples"] for verdict in result["verdicts"] if verdict["broken"]}
