"""The programs in the documents run as they stand there."""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from pathlib import Path

import pytest

from tests.harness import ServiceProcess
from tidings.client import User, Users, connect

_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(document: str) -> list[str]:
    return _BLOCK.findall((_ROOT / document).read_text())


@pytest.mark.parametrize("document", ["docs/client.md", "README.md"])
async def test_the_first_program_misses_nothing_over_a_kill(
    real: ServiceProcess, tmp_path: Path, document: str
) -> None:
    program = _blocks(document)[0].replace("127.0.0.1:50051", real.address)
    assert real.address in program
    async with connect(real.address) as channel:
        users = Users(channel)
        head = (await users.feed()).head_position
        name = f"u-{uuid.uuid4().hex[:12]}"
        ada = await users.create(User(username=name, email=f"{name}@example.com"))
        first = await _positions_until(program, tmp_path, f"{head + 1} {name} ")
        await users.update(User(id=ada.id, display_name="Ada"), ["display_name"])
        second = await _positions_until(program, tmp_path, f"{head + 2} {name} display_name")
    assert first == list(range(1, head + 2))
    # What it was processing when it was killed comes again.
    assert second[0] in (1, head + 1, head + 2)
    assert second == list(range(second[0], head + 3))


async def _positions_until(program: str, directory: Path, beginning: str) -> list[int]:
    """The positions that a program prints up to a line that begins so, at which it is killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "-c", program, cwd=directory,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    try:
        async with asyncio.timeout(30):
            while not lines or not lines[-1].startswith(beginning):
                read = await process.stdout.readline()
                assert read, lines
                lines.append(read.decode())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
    return [int(line.split()[0]) for line in lines]


def test_every_program_is_one() -> None:
    for document in ("docs/client.md", "README.md"):
        for block in _blocks(document):
            wrapped = f"async def program():\n{re.sub('^', ' ', block, flags=re.MULTILINE)}"
            compile(wrapped, document, "exec")
