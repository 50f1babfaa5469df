"""The migrations' command, run as the Job runs it, and one revision at a time."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Literal

from alembic import command
from sqlalchemy import create_engine, make_url

from migrations import runner
from tests.harness import Database, programs

Kind = Literal["users", "notifications"]
KINDS: tuple[Kind, ...] = ("users", "notifications")


@dataclass(frozen=True)
class Run:
    """What a run of the command printed, and its exit code."""

    code: int
    output: str


async def command_line(*arguments: str, **variables: str) -> Run:
    """Runs `python -m migrations` with these variables in its environment. It never ends with a stack trace."""
    process = await start(*arguments, **variables)
    output, _ = await process.communicate()
    assert process.returncode is not None
    assert "Traceback" not in output.decode(), output.decode()
    return Run(process.returncode, output.decode())


async def start(*arguments: str, **variables: str) -> programs.Process | asyncio.subprocess.Process:
    """Starts `python -m migrations` with these variables in its environment."""
    return await programs.start("migrations", *arguments, environment={**os.environ, **variables})


async def migrate(kind: Kind, made: Database, *arguments: str, **variables: str) -> Run:
    """Runs a command on one database: an upgrade unless another is named."""
    arguments_or_upgrade = arguments or ("upgrade", kind)
    return await command_line(*arguments_or_upgrade, **{f"TIDINGS_{kind.upper()}_DATABASE_URL": made.url}, **variables)


async def step(made: Database, revision: str) -> None:
    """Brings a users database to one revision of the history."""

    def upgrade() -> None:
        engine = create_engine(make_url(made.url).set(drivername="postgresql+psycopg"))
        with engine.connect() as connection:
            config = runner._config("users", connection=connection, still_alone=lambda: None)
            command.upgrade(config, revision)
        engine.dispose()

    await asyncio.to_thread(upgrade)
