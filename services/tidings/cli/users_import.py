"""`tidings users import`."""

from __future__ import annotations

import hashlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, reported, run
from tidings.cli.import_rows import Lines, Problem, Record, read_csv, read_json_lines
from tidings.cli.import_run import Import, StoppedError, Tally
from tidings.cli.options import USERS_ADDRESS, Json, UsersAddress, examples, users_at


class Format(StrEnum):
    """What a file holds."""

    CSV = "csv"
    JSONL = "jsonl"


_BY_SUFFIX = {".csv": Format.CSV, ".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".json": Format.JSONL}
_READERS = {Format.CSV: read_csv, Format.JSONL: read_json_lines}

_PROGRESS_EVERY = 50
_CHUNK = 1 << 20

_EXAMPLES = examples(
    "tidings users import people.csv",
    "tidings users import people.jsonl --json > result.jsonl",
    "zcat people.csv.gz | tidings users import - --format csv",
)


def register(group: typer.Typer) -> None:
    """Adds the command."""
    group.command("import", epilog=_EXAMPLES)(import_users)


def import_users(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file; - is standard input.")],
    file_format: Annotated[
        Format | None, typer.Option("--format", help="What FILE holds, if its name does not tell.")
    ] = None,
    retry_for: Annotated[
        float,
        typer.Option("--retry-for", min=0, metavar="SECONDS", help="How long to wait for a service that is away."),
    ] = 60.0,
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Create a user for each line of a file.

    CSV needs a header with username, email and, if wanted, display_name, locale, time_zone, labels.KEY. JSON lines
    are objects with the fields of a user. Bad lines are named and the import goes on; the exit code is then 7.

    Safe to repeat: within 24 hours the same file counts lines that are created already as created, so that a run after
    a kill completes. With --json there is one object per failure (line, field, reason, message) and one summary.
    """
    chosen = file_format or _BY_SUFFIX.get(Path(file).suffix.lower())
    if chosen is None:
        raise typer.BadParameter("say what the file holds", param_hint="--format")
    with reported(), _opened(file) as (opened, digest, size):
        lines = Lines(opened)
        run(_import(_READERS[chosen](lines), lines, size, digest, retry_for, address, as_json))


@contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, str, int]]:
    """The file from its beginning, the digest of its bytes, and its size."""
    with tempfile.TemporaryFile() as copy:
        if path == "-":
            # The digest must be known before the first line is sent.
            shutil.copyfileobj(sys.stdin.buffer, copy)
        else:
            try:
                given = Path(path).open("rb")  # noqa: SIM115 - closed below
            except OSError as error:
                raise CommandError(f"{path}: {error.strerror}", ExitCode.USAGE) from error
            with given:
                if stat.S_ISREG(Path(path).stat().st_mode):
                    yield given, *_measured(given)
                    return
                shutil.copyfileobj(given, copy)
        yield copy, *_measured(copy)


def _measured(file: BinaryIO) -> tuple[str, int]:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    size = file.tell()
    file.seek(0)
    return digest.hexdigest(), size


async def _import(
    records: Iterator[Record],
    lines: Lines,
    size: int,
    digest: str,
    retry_for: float,
    address: str,
    as_json: bool,
) -> None:
    async with users_at(address) as users:
        report = _report_json if as_json else _report
        running = Import(users, digest, retry_for=retry_for, report=report)
        try:
            with _progress(running.tally, lines, size) as advance:
                await running.run(_advancing(records, advance))
        except StoppedError as error:
            output.note(f"stopped: {running.tally}")
            message = f"the user service at {address} is not available: {error}; run the same command again to go on"
            raise CommandError(message, ExitCode.UNAVAILABLE) from error
        _summary(running.tally, as_json)
        if running.tally.failed:
            raise typer.Exit(ExitCode.BAD_LINES)


def _advancing(records: Iterator[Record], advance: Callable[[], None]) -> Iterator[Record]:
    for number, record in enumerate(records, 1):
        yield record
        if number % _PROGRESS_EVERY == 0:
            advance()


@contextmanager
def _progress(tally: Tally, lines: Lines, size: int) -> Iterator[Callable[[], None]]:
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=output.err, transient=True, disable=not output.err.is_terminal
    ) as progress:
        task = progress.add_task("", total=size)
        yield lambda: progress.update(task, completed=lines.read, description=str(tally))


def _report(problem: Problem) -> None:
    where = f"line {problem.line}: {problem.field}: " if problem.field else f"line {problem.line}: "
    output.note(where + problem.message)


def _report_json(problem: Problem) -> None:
    output.write([output.json_line(asdict(problem))])


def _summary(tally: Tally, as_json: bool) -> None:
    output.write([output.json_line(asdict(tally)) if as_json else str(tally)])
