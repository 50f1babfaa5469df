"""`tidings users watch`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import USERS_ADDRESS, Json, UsersAddress, channel_to, examples
from tidings.client import BadTokenError, CursorStore, FileCursor, MemoryCursor, UserFeed
from tidings.users.v1 import users_pb2


def _time(text: str) -> datetime:
    """A time as ISO 8601 has it, of this machine's zone if it names none."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is no time such as 2026-05-04T12:00:00Z") from error


class From(StrEnum):
    """Where to begin."""

    EARLIEST = "earliest"
    NOW = "now"


FromOption = Annotated[
    From | None,
    typer.Option("--from", help="Where to begin: what is retained, or what comes.", show_default="now"),
]
SinceOption = Annotated[
    datetime | None,
    typer.Option("--since", parser=_time, metavar="TIME", help="Begin with what was committed since; not with --from."),
]
CursorFile = Annotated[
    Path | None,
    typer.Option("--cursor-file", dir_okay=False, help="Go on after what was printed last time; kept up to date."),
]
LimitEvents = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Stop after N.")]

_MAX_BATCH = 1000

_EXAMPLES = examples(
    "tidings users watch",
    "tidings users watch --from earliest --json | jq .user.email",
    "tidings users watch --since 2026-05-04T12:00:00Z",
    "tidings users watch --from earliest --cursor-file seen.cursor --limit 100",
)


def register(group: typer.Typer) -> None:
    """Adds the command."""
    group.command("watch", epilog=_EXAMPLES)(watch)


def watch(
    start: FromOption = None,
    since: SinceOption = None,
    cursor_file: CursorFile = None,
    limit: LimitEvents = None,
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Print each change as it is committed.

    Runs until Ctrl-C. Reconnects by itself, without a gap. With --cursor-file, which counts more than --from and
    --since, a later run goes on where this one ended: nothing is missing and nothing twice. Only a change of many
    users at once (a batch create) that --limit cuts short is printed again from its beginning.
    """
    if start and since:
        raise typer.BadParameter("say --from or --since, not both", param_hint="--since")
    if cursor_file and not cursor_file.parent.is_dir():
        raise typer.BadParameter(f"no directory {cursor_file.parent}", param_hint="--cursor-file")
    cursor = FileCursor(cursor_file) if cursor_file else MemoryCursor()

    async def body() -> None:
        with _explained(cursor_file):
            await _watch(address, cursor, since or (start or From.NOW).value, limit, as_json)

    run(body())


@contextmanager
def _explained(cursor_file: Path | None) -> Iterator[None]:
    try:
        yield
    except (BadTokenError, UnicodeDecodeError) as error:
        if cursor_file is None:
            raise
        message = f"--cursor-file: {cursor_file} holds no token of this service; remove it to begin anew"
        raise CommandError(message, ExitCode.INVALID) from error


async def _watch(
    address: str, cursor: CursorStore, start: datetime | Literal["earliest", "now"], limit: int | None, as_json: bool
) -> None:
    async with channel_to("user service", address) as channel:
        left, max_batch = limit, _MAX_BATCH
        while left is None or left > 0:
            # Progress brings the first bookmark: its token keeps the place of a watch that has seen nothing yet.
            feed = UserFeed(channel, cursor=cursor, start=start, max_batch=max_batch, progress=True)
            async with aclosing(aiter(feed)) as batches:
                async for batch in batches:
                    if left is not None and left < len(batch.events) and left < max_batch:
                        # A token stands only at the end of a batch: have the rest cut to fit.
                        max_batch = left
                        break
                    output.write(map(_json if as_json else _line, batch.events[:left]))
                    if left is None:
                        continue
                    left -= len(batch.events)
                    if left == 0:
                        await cursor.save(batch.resume_token)
                    if left <= 0:
                        break


def _json(event: users_pb2.UserEvent) -> str:
    return output.json_line(event)


def _line(event: users_pb2.UserEvent) -> str:
    kind = users_pb2.UserEvent.Type.Name(event.type)
    changed = " ".join(event.changed_fields)
    line = f"{event.position:>9}  {output.time(event.commit_time)}  {kind:<9}  {event.user.username:<24}  {changed}"
    return output.shown(line.rstrip())
