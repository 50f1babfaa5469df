"""`tidings users watch`."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import aclosing, contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import USERS_ADDRESS, Json, UsersAddress, channel_to, examples, parsed_labels
from tidings.client import (
    BadTokenError,
    Batch,
    CursorStore,
    FileCursor,
    LostPlaceError,
    MemoryCursor,
    TokenMismatchError,
    UserFeed,
)
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


class Kind(StrEnum):
    """What an event says of its user."""

    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"
    UNDELETED = "undeleted"


class Field(StrEnum):
    """A field of a user that an event may change."""

    USERNAME = "username"
    EMAIL = "email"
    DISPLAY_NAME = "display_name"
    LOCALE = "locale"
    TIME_ZONE = "time_zone"
    LABELS = "labels"
    DELETE_TIME = "delete_time"
    PURGE_TIME = "purge_time"


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

_Snapshot = Annotated[
    bool,
    typer.Option(
        "--snapshot",
        help="Begin with every living user, also if what follows the cursor is no longer kept; "
        "not with --from, --since, --type, --changed-field.",
    ),
]
_Users = Annotated[
    list[str] | None, typer.Option("--user", metavar="ID", help="Only this user; may be repeated for others.")
]
_Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label", metavar="KEY=VALUE", help="Only users who have, or had before, this label; if repeated, all of them."
    ),
]
_Kinds = Annotated[
    list[Kind] | None,
    typer.Option("--type", case_sensitive=False, help="Only changes of this type; may be repeated for others."),
]
_Fields = Annotated[
    list[Field] | None,
    typer.Option("--changed-field", help="Only changes of this field; may be repeated for others."),
]
_Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="INDEX/COUNT", help="Only users of one of COUNT equal parts, numbered from 0: 0/4 to 3/4."
    ),
]

_MAX_BATCH = 1000
_MOST_SHARDS = 65_536

_EXAMPLES = examples(
    "tidings users watch",
    "tidings users watch --from earliest --json | jq .user.email",
    "tidings users watch --since 2026-05-04T12:00:00Z",
    "tidings users watch --from earliest --cursor-file seen.cursor --limit 100",
    "tidings users watch --snapshot --label team=engines --cursor-file engines.cursor --json",
    "tidings users watch --type created --type deleted --shard 0/4",
)


def register(group: typer.Typer) -> None:
    """Adds the command."""
    group.command("watch", epilog=_EXAMPLES)(watch)


def watch(
    start: FromOption = None,
    since: SinceOption = None,
    snapshot: _Snapshot = False,
    user: _Users = None,
    label: _Labels = None,
    kind: _Kinds = None,
    changed_field: _Fields = None,
    shard: _Shard = None,
    cursor_file: CursorFile = None,
    limit: LimitEvents = None,
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Print each change as it is committed.

    Runs until Ctrl-C. Reconnects by itself, without a gap. With --cursor-file, which counts more than --from, --since
    and --snapshot, a later run goes on where this one ended: nothing is missing and nothing twice. Only a change of
    many users at once (a batch create) that --limit cuts short is printed again from its beginning.

    Who no longer has the labels that were asked for is printed once more, as having left the filter (left_filter). A
    snapshot is printed between the lines that mark its beginning and end (snapshot_begin, snapshot_end).
    """
    if start and since:
        raise typer.BadParameter("say --from or --since, not both", param_hint="--since")
    if snapshot and (start or since):
        raise typer.BadParameter("a snapshot begins now: leave out --from and --since", param_hint="--snapshot")
    if snapshot and (kind or changed_field):
        message = "a snapshot has no changes to choose from: leave out --type and --changed-field"
        raise typer.BadParameter(message, param_hint="--snapshot")
    if cursor_file and not cursor_file.parent.is_dir():
        raise typer.BadParameter(f"no directory {cursor_file.parent}", param_hint="--cursor-file")
    asked: dict[str, Any] = {
        "start": "snapshot" if snapshot else since or (start or From.NOW).value,
        "snapshot_on": LostPlaceError if snapshot else (),
        "user_ids": _parsed_ids(user) or None,
        "labels": parsed_labels(label) or None,
        "types": [users_pb2.UserEvent.Type.Value(one.name) for one in kind or ()] or None,
        "changed_fields": [one.value for one in changed_field or ()] or None,
        "shard": _parsed_shard(shard),
    }
    cursor = FileCursor(cursor_file) if cursor_file else MemoryCursor()

    async def body() -> None:
        with _explained(cursor_file):
            await _watch(address, cursor, asked, limit, as_json)

    run(body())


def _parsed_ids(given: Iterable[str] | None) -> list[str]:
    ids = []
    for text in given or ():
        try:
            ids.append(str(uuid.UUID(text)))
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no id of a user", param_hint="--user") from error
    return ids


def _parsed_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not INDEX/COUNT such as 0/4", param_hint="--shard")
    if not int(index) < int(count) <= _MOST_SHARDS:
        message = f"{text!r}: the index must be below the count, and the count at most {_MOST_SHARDS}"
        raise typer.BadParameter(message, param_hint="--shard")
    return int(index), int(count)


@contextmanager
def _explained(cursor_file: Path | None) -> Iterator[None]:
    try:
        yield
    except (BadTokenError, UnicodeDecodeError, TokenMismatchError) as error:
        if cursor_file is None:
            raise
        is_other = isinstance(error, TokenMismatchError)
        what = "is of a watch of other users or changes" if is_other else "holds no token of this service"
        message = f"--cursor-file: {cursor_file} {what}; remove it to begin anew"
        raise CommandError(message, ExitCode.INVALID) from error


async def _watch(address: str, cursor: CursorStore, asked: dict[str, Any], limit: int | None, as_json: bool) -> None:
    async with channel_to("user service", address) as channel:
        left, max_batch = limit, min(limit or _MAX_BATCH, _MAX_BATCH)
        while left is None or left > 0:
            # Progress brings the first bookmark: its token keeps the place of a watch that has seen nothing yet.
            feed = UserFeed(channel, cursor=cursor, max_batch=max_batch, progress=True, **asked)
            async with aclosing(aiter(feed)) as batches:
                async for batch in batches:
                    if left is not None and left < len(batch.events) and left < max_batch:
                        # A token stands only at the end of a batch: have the rest cut to fit.
                        max_batch = left
                        break
                    if batch.snapshot in ("begin", "end"):
                        output.write([_mark(batch, as_json)])
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
    changed = " ".join((*event.changed_fields, *(["(left the filter)"] if event.left_filter else [])))
    line = f"{event.position:>9}  {output.time(event.commit_time)}  {kind:<9}  {event.user.username:<24}  {changed}"
    return output.shown(line.rstrip())


def _mark(batch: Batch, as_json: bool) -> str:
    """The beginning or end of a snapshot; in JSON as the message of the stream has it."""
    if as_json:
        return output.json_line({f"snapshot_{batch.snapshot}": {"position": str(batch.position)}})
    return f"{batch.position:>9}  snapshot {batch.snapshot}s"
