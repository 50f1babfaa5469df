"""The SQL of the group commit: lock and read (`begin`), write and COMMIT (`commit`), and what became of it (`outcome`).

Statements are built by SQLAlchemy Core, compiled at import, and prepared on the writer's own connection. Each is
run once for a batch, with arrays: what a statement costs is paid once for all its users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, Literal, NamedTuple

import psycopg
from google.protobuf import timestamp_pb2
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

from servicekit import arrays, flush
from servicekit.database import Connection
from servicekit.flush import Call, statement
from tidings.users.v1 import users_pb2
from user_service.domain import AnswerKey, Change, Known, Row
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
_answer_columns = (answers.c.caller, answers.c.method, answers.c.body_hash, answers.c.response)


def _null(kind: TypeEngine[Any]) -> Any:
    return cast(literal_column("NULL"), kind)


_no_answer = tuple(_null(column.type) for column in _answer_columns)


def _held_by_another(column: str) -> Any:
    same = _other.c[column] == users.c[column]
    return and_(users.c.delete_time.is_not(None), exists().where(same, _other.c.delete_time.is_(None)))


# A statement's snapshot is older than the lock it waits for: the lock comes first, in a statement of its own.
_LOCK_FEED = statement(
    "lock_feed",
    select(
        feed.c.head_position,
        func.greatest(feed.c.head_time, func.clock_timestamp()),
        cast(func.pg_current_xact_id(), Text),
    ).with_for_update(),
)
_READ_ROWS = statement(
    "read_rows",
    select(*USER_COLUMNS, _held_by_another("username"), _held_by_another("email_key")).where(
        users.c.id == any_(_array("ids", _UUID))
    ),
)
# Who has the wanted names, and what was answered before, in one statement; unused columns are NULL.
_READ_TAKEN = statement(
    "read_taken",
    union_all(
        select(users.c.id, users.c.username, _null(Text()), *_no_answer).where(
            _is_living, users.c.username == any_(_array("usernames", Text()))
        ),
        select(users.c.id, _null(Text()), users.c.email_key, *_no_answer).where(
            _is_living, users.c.email_key == any_(_array("email_keys", Text()))
        ),
        select(answers.c.request_id, _null(Text()), _null(Text()), *_answer_columns).where(
            answers.c.request_id == any_(_array("request_ids", _UUID))
        ),
    ),
)


def _rows(**columns: TypeEngine[Any]) -> Any:
    """A table made of one array parameter per column."""
    arrays = [_array(name, kind) for name, kind in columns.items()]
    return func.unnest(*arrays).table_valued(*columns).render_derived()


_new = _rows(
    id=_UUID,
    username=Text(),
    email=Text(),
    email_key=Text(),
    display_name=Text(),
    locale=Text(),
    time_zone=Text(),
    labels=Text(),
)
_insert_users = insert(users).from_select(
    [*_new.c.keys(), "version", "create_time", "update_time"],
    select(
        *(cast(column, JSONB) if column.name == "labels" else column for column in _new.c),
        literal_column("1"),
        _bind("now", _TIME),
        _bind("now", _TIME),
    ),
)
_changed = _rows(
    changed_id=_UUID,
    changed_username=Text(),
    changed_email=Text(),
    changed_email_key=Text(),
    changed_display_name=Text(),
    changed_locale=Text(),
    changed_time_zone=Text(),
    changed_labels=Text(),
    changed_version=BigInteger(),
    changed_delete_time=_TIME,
    changed_purge_time=_TIME,
)
_update_users = (
    update(users)
    .where(users.c.id == _changed.c.changed_id)
    .values(
        {
            column.name.removeprefix("changed_"): cast(column, JSONB) if column.name == "changed_labels" else column
            for column in _changed.c
            if column.name != "changed_id"
        }
        | {"update_time": _bind("now", _TIME)}
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
_insert_events = insert(user_events).from_select(
    [*_event.c.keys(), "commit_time"], select(*_event.c, _bind("now", _TIME))
)
_answer = _rows(request_id=_UUID, caller=Text(), method=Text(), body_hash=LargeBinary(), response=LargeBinary())
_insert_answers = insert(answers).from_select(
    [*_answer.c.keys(), "create_time"], select(*_answer.c, _bind("now", _TIME))
)
_advance_feed = update(feed).values(head_position=_bind("head", BigInteger()), head_time=_bind("now", _TIME))

# Everything a batch writes is one statement, for each costs a round through psycopg: one for batches that only create,
# one for the others.
_WRITE_CREATED = statement(
    "write_created",
    _advance_feed.add_cte(_insert_users.cte("new_users"), _insert_events.cte("events"), _insert_answers.cte("kept")),
)
_WRITE_ANY = statement(
    "write_any",
    _advance_feed.add_cte(
        _insert_users.cte("new_users"),
        _update_users.cte("changed_users"),
        _insert_events.cte("events"),
        _insert_answers.cte("kept"),
    ),
)
_BEGIN = statement("begin", "BEGIN")
_COMMIT = statement("commit", "COMMIT")
_ROLLBACK = statement("rollback", "ROLLBACK")
_FORGET_PLANS = statement("forget_plans", "DISCARD PLANS")

# What the writer's connection prepares.
STATEMENTS = (
    _BEGIN,
    _LOCK_FEED,
    _READ_TAKEN,
    _READ_ROWS,
    _WRITE_CREATED,
    _WRITE_ANY,
    _COMMIT,
    _ROLLBACK,
    _FORGET_PLANS,
)

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

    ids: list[bytes]
    usernames: list[str]
    email_keys: list[str]
    request_ids: list[bytes]


class Answer(NamedTuple):
    """What is kept for a request_id."""

    key: AnswerKey
    body_hash: bytes
    response: bytes


async def begin(connection: Connection, lookups: Lookups) -> tuple[Locked, Known]:
    """Opens the transaction of a batch: locks the feed, then reads all that the batch must know. One flush."""
    known = Known()
    wanted = {
        "usernames": arrays.texts(lookups.usernames),
        "email_keys": arrays.texts(lookups.email_keys),
        "request_ids": arrays.ids(lookups.request_ids),
    }
    calls = [Call(_BEGIN, {}), Call(_LOCK_FEED, {}), Call(_READ_TAKEN, wanted)]
    if lookups.ids:
        calls.append(Call(_READ_ROWS, {"ids": arrays.ids(lookups.ids)}))
    _, locked, taken, *rows = await flush.run(connection, calls)
    if not locked:
        raise LookupError("the feed's row is missing: the schema is not complete")
    for id_, username, email_key, caller, method, body_hash, response in taken:
        if username is not None:
            known.usernames[username] = id_.bytes
        elif email_key is not None:
            known.email_keys[email_key] = id_.bytes
        else:
            known.answers[(id_.bytes, caller, method)] = (body_hash, response)
    for row in rows[0] if rows else ():
        known.rows[row[0].bytes] = Row(user_of(row), row[3], row[12], row[13], row[14])
    return Locked(*locked[0]), known


def _json(labels: Mapping[str, str]) -> str:
    # json.dumps takes five times as long to find out that it was given texts.
    return "{" + ",".join([f"{_quoted(key)}:{_quoted(value)}" for key, value in labels.items()]) + "}"


def _user_arrays(changes: Sequence[Change], prefix: str = "") -> dict[str, Any]:
    people = [change.user for change in changes]
    columns = {
        "id": arrays.ids([change.id for change in changes]),
        "username": arrays.texts([user.username for user in people]),
        "email": arrays.texts([user.email for user in people]),
        "email_key": arrays.texts([change.email_key for change in changes]),
        "display_name": arrays.texts([user.display_name for user in people]),
        "locale": arrays.texts([user.locale for user in people]),
        "time_zone": arrays.texts([user.time_zone for user in people]),
        "labels": arrays.texts([_json(change.labels) for change in changes]),
    }
    return {prefix + name: column for name, column in columns.items()}


def _changed_arrays(changes: Sequence[Change]) -> dict[str, Any]:
    return _user_arrays(changes, "changed_") | {
        "changed_version": arrays.bigints([change.user.version for change in changes]),
        "changed_delete_time": arrays.times([_when(change.user, "delete_time") for change in changes]),
        "changed_purge_time": arrays.times([_when(change.user, "purge_time") for change in changes]),
    }


def _when(user: users_pb2.User, field: Literal["delete_time", "purge_time"]) -> datetime | None:
    stamp: timestamp_pb2.Timestamp = getattr(user, field)
    return stamp.ToDatetime(tzinfo=UTC) if user.HasField(field) else None


async def commit(
    connection: Connection,
    locked: Locked,
    changes: Sequence[Change],
    entries: Sequence[Entry],
    kept: Sequence[Answer],
) -> None:
    """Writes what a batch decided and commits. One flush; until it returns the outcome is unknown."""
    changed = [change for change in changes if change.previous is not None]
    values = _user_arrays([change for change in changes if change.previous is None]) | {
        "position": arrays.bigints([entry.position for entry in entries]),
        "event_id": arrays.ids([entry.event_id for entry in entries]),
        "user_id": arrays.ids([entry.user_id for entry in entries]),
        "shard_hash": arrays.bigints([shard_hash(entry.user_id) for entry in entries]),
        "type": arrays.smallints([entry.type for entry in entries]),
        "changed_fields": arrays.integers([entry.changed_fields for entry in entries]),
        "group_end": arrays.booleans([entry.group_end for entry in entries]),
        "element": arrays.byteas([entry.element for entry in entries]),
        "previous": arrays.byteas([entry.previous for entry in entries]),
        "request_id": arrays.ids([answer.key[0] for answer in kept]),
        "caller": arrays.texts([answer.key[1] for answer in kept]),
        "method": arrays.texts([answer.key[2] for answer in kept]),
        "body_hash": arrays.byteas([answer.body_hash for answer in kept]),
        "response": arrays.byteas([answer.response for answer in kept]),
        "now": locked.time,
        "head": entries[-1].position if entries else locked.head,
    }
    if changed:
        values |= _changed_arrays(changed)
    write = Call(_WRITE_ANY if changed else _WRITE_CREATED, values)
    await flush.run(connection, [write, Call(_COMMIT, {})])


async def roll_back(connection: Connection) -> None:
    """Ends the transaction of a batch that writes nothing."""
    await flush.run(connection, [Call(_ROLLBACK, {})])


async def forget_plans(connection: Connection) -> None:
    """Has every statement planned anew. A plan made for empty tables reads them whole when they have grown."""
    await flush.run(connection, [Call(_FORGET_PLANS, {})])


async def outcome(connection: Connection, xid: str) -> str | None:
    """What became of a transaction: `committed`, `aborted`, `in progress`, or None if it is too old to tell."""
    try:
        cursor = await connection.execute(_XACT_STATUS, {"xid": xid})
    except psycopg.errors.InvalidParameterValue:
        # An id "in the future": Postgres has crashed and knows nothing of the transaction.
        return "aborted"
    row = await cursor.fetchone()
    return row[0] if row else None
