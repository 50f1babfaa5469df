"""The last questions of a run: what the tables say, and whether tokens of any age are still good on every replica."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc.aio

from tests.faults.asking import reason_of
from tests.faults.following import Habit, channels, received, request_of, watch
from tests.faults.journal import Journal
from tests.faults.site import Site
from tests.harness import Database
from tests.proof.records import Closed, Head, Message, Opened, Record, Row, load, state
from tidings.users.v1 import users_pb2
from user_service import tokens

_TOKENS = 60
_USERS = (
    "SELECT id, username, email, display_name, locale, time_zone, labels, version,"
    " create_time, update_time, delete_time, purge_time FROM users"
)


async def tables(database: Database) -> list[Record]:
    """Every user of the table, and the feed's ends."""
    rows = await database.fetch(_USERS)
    [[earliest, head]] = await database.fetch("SELECT earliest_position, head_position FROM feed")
    return [*(Row(state(_user(row))) for row in rows), Head(int(str(earliest)), int(str(head)))]


def _user(row: tuple[Any, ...]) -> users_pb2.User:
    id_, username, email, display_name, locale, time_zone, labels, version, *times = row
    user = users_pb2.User(
        id=str(id_), username=username, email=email, display_name=display_name, locale=locale, time_zone=time_zone,
        labels=labels, version=version,
    )  # fmt: skip
    for name, time_ in zip(("create_time", "update_time", "delete_time", "purge_time"), times, strict=True):
        if isinstance(time_, datetime):
            getattr(user, name).FromDatetime(time_)
    return user


def _some_tokens(directory: Path, chance: random.Random) -> list[str]:
    """Tokens that readers were handed, from all times of the run."""
    kept: list[str] = []
    seen = 0
    with (directory / "readers.jsonl").open("rb") as file:
        for line in file:
            if not line.startswith(b'["Message"') or chance.random() > 0.1:
                continue
            record = load(line)
            assert isinstance(record, Message)
            # A token of a stream that selects is good for the same selection only.
            if not record.token or record.stream.startswith("pick-"):
                continue
            seen += 1
            if len(kept) < _TOKENS:
                kept.append(record.token)
            elif chance.random() < _TOKENS / seen:
                kept[chance.randrange(_TOKENS)] = record.token
    return kept


def _forge(token: str, number: int) -> str:
    """A token of another log, or of another history of this one."""
    honest = tokens.decode(token)
    if number % 2 and honest.position:
        return tokens.encode(replace(honest, event_hash=bytes(byte ^ 1 for byte in honest.event_hash)))
    return tokens.encode(replace(honest, log_id=uuid.uuid4()))


async def try_tokens(site: Site, directory: Path, seed: int) -> None:
    """Resumes each of some tokens on every replica and reads the first messages; forged ones too."""
    chance = random.Random(f"{seed} probes")
    journal = Journal(directory / "probes.jsonl")
    opened = channels(site.addresses)
    for number, token in enumerate(_some_tokens(directory, chance)):
        for replica, channel in enumerate(opened):
            await _try(f"probe-{number}-{replica}", channel, replica, "token", token, journal)
        if number < _TOKENS // 3:
            replica = number % len(opened)
            await _try(f"forged-{number}", opened[replica], replica, "forged", _forge(token, number), journal)
    for channel in opened:
        await channel.close()
    journal.close()


async def _try(name: str, channel: grpc.aio.Channel, replica: int, start: str, token: str, journal: Journal) -> None:
    habit = Habit(name, start, max_batch=5)
    journal.note(
        Opened(name, name, replica, time.monotonic(), start, token, habit.interval, 0, habit.selection, paced=True)
    )
    call = watch(channel, request_of(habit, start, token, 0))
    try:
        for _ in range(2):
            data = await call.read()
            if data is grpc.aio.EOF:
                journal.note(Closed(name, time.monotonic(), "server", "OK", "", 0))
                return
            journal.note(received(name, data, time.monotonic()))
        journal.note(Closed(name, time.monotonic(), "reader", "", "probe", 0))
    except grpc.aio.AioRpcError as error:
        reason, metadata = reason_of(error)
        earliest = int(metadata.get("earliest_position", 0))
        journal.note(Closed(name, time.monotonic(), "server", error.code().name, reason, earliest))
    finally:
        call.cancel()
