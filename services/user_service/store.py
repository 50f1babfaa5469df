"""The SQL of the group commit: lock and read (`begin`), write and COMMIT (`commit`), and what became of it (`outcome`).

Statements are built by SQLAlchemy Core, compiled at import, and run by psycopg on the writer's own connection. Each is run once
for a batch, with arrays: what a statement costs is paid once for all its users.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    DateTime,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    exists,
    func,
    insert,
    literal_column,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.sql.type_api import TypeEngine

from servicekit.database import Connection, sql
from tidings.users.v1 import users_pb2
from user_service.domain import AnswerKey, Change, Known, Row, field_bits
from user_service.events import Entry, shard_hash
from user_service.reads import USER_COLUMNS, user_of
from user_service.tables import answers, feed, user_events, users

_TIME = DateTime(timezone=True)
_UUID = UUID(as_uuid=True)


def _bind(name: str, kind: TypeEngine[Any]) -> Any:
    return bindparam(name, type_=kind)


def _array(name: str, kind: TypeEngine[Any]) -> Any:
    return bindparam(name, type_=ARRAY(kind))


_is_living = users.c.delete_time.is_(None)
_other = users.alias("other")


def _held_by_another(column: str) -> Any:
    same = _other.c[column] == users.c[column]
    return and_(users.c.delete_time.is_not(None), exists().where(same, _other.c.delete_time.is_(None)))


# A statement's snapshot is older than the lock it waits for: the lock comes first, in a statement of its own.
_LOCK_FEED = sql(
    select(
        feed.c.head_position,
        func.greatest(feed.c.head_time, func.clock_timestamp()),
        cast(func.pg_current_xact_id(), Text),
    ).with_for_update()
)
_READ_ROWS = sql(
    select(*USER_COLUMNS, _held_by_another("username"), _held_by_another("email_key")).where(
        users.c.id == any_(_array("ids", _UUID))
    )
)
_READ_NAMES = sql(
    union_all(
        select(users.c.username, literal_column("NULL"), users.c.id).where(
            _is_living, users.c.username == any_(_array("usernames", Text))
        ),
        select(literal_column("NULL"), users.c.email_key, users.c.id).where(
            _is_living, users.c.email_key == any_(_array("email_keys", Text))
        ),
    )
)
_READ_ANSWERS = sql(
    select(answers.c.request_id, answers.c.caller, answers.c.method, answers.c.body_hash, answers.c.response).where(
        answers.c.request_id == any_(_array("request_ids", _UUID))
    )
)


def _rows(**columns: TypeEngine[Any]) -> Any:
    """A table made of one array parameter per column."""
    arrays = [_array(name, kind) for name, kind in columns.items()]
    return func.unnest(*arrays).table_valued(*columns).render_derived()


_new = _rows(
    id=_UUID, username=Text(), email=Text(), email_key=Text(), display_name=Text(), locale=Text(), time_zone=Text(), labels=Text()
)
_INSERT_USERS = sql(
    insert(users).from_select(
        [*_new.c.keys(), "version", "create_time", "update_time"],
        select(
            *(cast(column, JSONB) if column.name == "labels" else column for column in _new.c),
            literal_column("1"),
            _bind("now", _TIME),
            _bind("now", _TIME),
        ),
    )
)
_changed = _rows(
    id=_UUID,
    username=Text(),
    email=Text(),
    email_key=Text(),
    display_name=Text(),
    locale=Text(),
    time_zone=Text(),
    labels=Text(),
    version=BigInteger(),
    delete_time=_TIME,
    purge_time=_TIME,
)
_UPDATE_USERS = sql(
    update(users)
    .where(users.c.id == _changed.c.id)
    .values(
        {column.name: column for column in _changed.c if column.name not in ("id", "labels")}
        | {"labels": cast(_changed.c.labels, JSONB), "update_time": _bind("now", _TIME)}
    )
)
_event = _rows(
    position=BigInteger(),
    event_id=_UUID,
    user_id=_UUID,
    shard_hash=BigInteger(),
    type=SmallInteger(),
    changed_fields=Integer(),
    group_end=Boolean(),
    element=LargeBinary(),
    previous=LargeBinary(),
)
_INSERT_EVENTS = sql(
    insert(user_events).from_select(
        [*_event.c.keys(), "commit_time"], select(*_event.c, _bind("now", _TIME))
    )
)
_answer = _rows(request_id=_UUID, caller=Text(), method=Text(), body_hash=LargeBinary(), response=LargeBinary())
_INSERT_ANSWERS = sql(
    insert(answers).from_select([*_answer.c.keys(), "create_time"], select(*_answer.c, _bind("now", _TIME)))
)
_ADVANCE_FEED = sql(update(feed).values(head_position=_bind("head", BigInteger()), head_time=_bind("now", _TIME)))
_XACT_STATUS = "SELECT pg_xact_status(%(xid)s::xid8)"

@dataclass(frozen=True, slots=True)
class Locked:
    """What is known once the feed is locked: its head, the commit time of the batch, the transaction's id."""

    head: int
    time: datetime
    xid: str


@dataclass(frozen=True, slots=True)
class Lookups:
    """What a batch must read."""

    ids: list[uuid.UUID]
    usernames: list[str]
    email_keys: list[str]
    request_ids: list[uuid.UUID]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is kept for a request_id."""

    key: AnswerKey
    body_hash: bytes
    response: bytes


async def begin(connection: Connection, lookups: Lookups) -> tuple[Locked, Known]:
    """Opens the transaction of a batch: locks the feed, then reads all that the batch must know. One flush."""
    known = Known()
    async with connection.pipeline():
        await connection.execute("BEGIN")
        lock = await connection.execute(_LOCK_FEED, binary=True)
        rows = await connection.execute(_READ_ROWS, {"ids": lookups.ids}, binary=True) if lookups.ids else None
        names = None
        if lookups.usernames or lookups.email_keys:
            wanted = {"usernames": lookups.usernames, "email_keys": lookups.email_keys}
            names = await connection.execute(_READ_NAMES, wanted, binary=True)
        kept = None
        if lookups.request_ids:
            kept = await connection.execute(_READ_ANSWERS, {"request_ids": lookups.request_ids}, binary=True)
    locked = await lock.fetchone()
    if locked is None:
        raise LookupError("the feed's row is missing: the schema is not complete")
    if rows is not None:
        for row in await rows.fetchall():
            known.rows[row[0]] = Row(user_of(row), row[3], row[12], row[13], row[14])
    if names is not None:
        for username, email_key, user_id in await names.fetchall():
            if username is not None:
                known.usernames[username] = user_id
            else:
                known.email_keys[email_key] = user_id
    if kept is not None:
        for request_id, caller, method, body_hash, response in await kept.fetchall():
            known.answers[(request_id, caller, method)] = (body_hash, response)
    return Locked(*locked), known


def _user_arrays(changes: Sequence[Change]) -> dict[str, Any]:
    people = [change.user for change in changes]
    return {
        "id": [change.id for change in changes],
        "username": [user.username for user in people],
        "email": [user.email for user in people],
        "email_key": [change.email_key for change in changes],
        "display_name": [user.display_name for user in people],
        "locale": [user.locale for user in people],
        "time_zone": [user.time_zone for user in people],
        "labels": [json.dumps(dict(user.labels)) if user.labels else "{}" for user in people],
    }


def _when(user: users_pb2.User, field: str) -> datetime | None:
    return getattr(user, field).ToDatetime(tzinfo=UTC) if user.HasField(field) else None  # type: ignore[arg-type, no-any-return]


async def commit(
    connection: Connection,
    locked: Locked,
    changes: Sequence[Change],
    entries: Sequence[Entry],
    kept: Sequence[Answer],
) -> None:
    """Writes what a batch decided and commits. One flush; until it returns the outcome is unknown."""
    created = [change for change in changes if change.previous is None]
    changed = [change for change in changes if change.previous is not None]
    now = locked.time
    async with connection.pipeline():
        if created:
            await connection.execute(_INSERT_USERS, _user_arrays(created) | {"now": now})
        if changed:
            arrays = _user_arrays(changed) | {
                "version": [change.user.version for change in changed],
                "delete_time": [_when(change.user, "delete_time") for change in changed],
                "purge_time": [_when(change.user, "purge_time") for change in changed],
                "now": now,
            }
            await connection.execute(_UPDATE_USERS, arrays)
        if entries:
            await connection.execute(
                _INSERT_EVENTS,
                {
                    "position": [entry.position for entry in entries],
                    "event_id": [uuid.UUID(bytes=entry.event_id) for entry in entries],
                    "user_id": [change.id for change in changes],
                    "shard_hash": [shard_hash(change.id) for change in changes],
                    "type": [change.type for change in changes],
                    "changed_fields": [field_bits(change.changed_fields) for change in changes],
                    "group_end": [entry.group_end for entry in entries],
                    "element": [entry.element for entry in entries],
                    "previous": [entry.previous for entry in entries],
                    "now": now,
                },
            )
            await connection.execute(_ADVANCE_FEED, {"head": entries[-1].position, "now": now})
        if kept:
            await connection.execute(
                _INSERT_ANSWERS,
                {
                    "request_id": [answer.key[0] for answer in kept],
                    "caller": [answer.key[1] for answer in kept],
                    "method": [answer.key[2] for answer in kept],
                    "body_hash": [answer.body_hash for answer in kept],
                    "response": [answer.response for answer in kept],
                    "now": now,
                },
            )
        await connection.execute("COMMIT")


async def outcome(connection: Connection, xid: str) -> str | None:
    """What became of a transaction: `committed`, `aborted`, `in progress`, or None if it is too old to tell."""
    cursor = await connection.execute(_XACT_STATUS, {"xid": xid})
    row = await cursor.fetchone()
    return row[0] if row else None
