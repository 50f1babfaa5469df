"""The SQL of sends: what callers asked for, whose turn it is, and how far each is.

A send is expanded by pages. Who takes its turn has the next epoch; a page's notifications are stored with the send's
progress in one transaction, under the lock of the send's row and only by the newest epoch, as long as it is SENDING.
So each recipient has one notification, whoever is killed when; and once a cancellation is committed none is made any
more.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as insert_or_ignore

from notification_service import errors
from notification_service.domain import Notification, Order, SendState, stamp
from notification_service.store import audience, writes
from notification_service.store.parts import MILLISECOND, SECOND, TIME, UUID, bind, is_free, number
from notification_service.tables import recipients_feed, sends
from servicekit import arrays
from servicekit.database import Connection, sql
from tidings.notifications.v1 import sends_pb2

# How long a send that is due waits for the copy of the users to be as new as the feed was at the call, seconds.
PATIENCE = 30
MOST_UNKNOWN = 100
# What is removed is a year old, or as old as the operator wants: it happens once.
_CREATE_TRIES = 3

_send, _copy = sends.c, recipients_feed.c
_IS = {state: number(state) for state in SendState}
_id = bind("id", UUID)
_BEFORE = bind("before", BigInteger())
_MOST = bind("most", Integer())

_COUNTS = ("matched", "made", "unknown", "deleted", "no_address", "not_composed")
_COLUMNS = (
    "position", "id", "template", "category", "channels", "params", "user_ids", "filter", "send_time", "state",
    "failure", *_COUNTS, "unknown_ids", "actor", "create_time", "start_time", "end_time", "trace_parent", "trace_state",
)  # fmt: skip

_CREATE = sql(
    insert_or_ignore(sends)
    .values(
        id=_id,
        template=bind("template", Text()),
        category=bind("category", Text()),
        channels=bind("channels", ARRAY(Text())),
        params=cast(bind("params", Text()), JSONB),
        user_ids=bind("user_ids", ARRAY(UUID)),
        filter=cast(bind("filter", Text()), JSONB),
        send_time=func.coalesce(bind("send_time", TIME), func.now()),
        log_id=bind("log_id", UUID),
        feed_position=bind("feed_position", BigInteger()),
        actor=bind("actor", Text()),
        request_id=bind("request_id", UUID),
        request_hash=bind("request_hash", LargeBinary()),
        trace_parent=bind("trace_parent", Text()),
        trace_state=bind("trace_state", Text()),
        create_time=func.now(),
    )
    .on_conflict_do_nothing(index_elements=[_send.actor, _send.request_id])
    .returning(_send.id)
)
_MADE_BY = sql(
    select(_send.id, _send.request_hash).where(
        _send.actor == bind("actor", Text()), _send.request_id == bind("request_id", UUID)
    )
)
_FIND = sql(select(*(_send[name] for name in _COLUMNS)).where(_send.id == _id))
# A copy that is not whole is never sent by, however long that takes.
_is_found = or_(
    and_(_copy.log_id == _send.log_id, _copy.position >= _send.feed_position),
    func.greatest(_send.create_time, _send.send_time) + number(PATIENCE) * SECOND <= func.now(),
)
_due = (
    select(_send.id, _copy.position.label("as_of"))
    .join(recipients_feed, true())
    .where(
        _send.state.in_((_IS[SendState.SCHEDULED], _IS[SendState.SENDING])),
        _send.send_time <= func.now(),
        is_free(_send),
        _copy.position.is_not(None),
        _is_found,
    )
    .order_by(_send.turn_time.nulls_first(), _send.send_time)
    .limit(number(1))
    .with_for_update(of=sends, skip_locked=True)
    .cte("due")
)
_TAKE = sql(
    update(sends)
    .where(_send.id == _due.c.id)
    .values(
        state=_IS[SendState.SENDING],
        epoch=_send.epoch + number(1),
        lease_until=func.now() + bind("lease", Integer()) * MILLISECOND,
        start_time=func.coalesce(_send.start_time, func.now()),
    )
    .returning(
        _send.id,
        _send.epoch,
        _send.template,
        _send.category,
        _send.channels,
        _send.params,
        _send.user_ids,
        _send.filter,
        func.greatest(_send.send_time, _send.create_time),
        _send.actor,
        _send.trace_parent,
        _send.trace_state,
        _send.passed,
        _send.unknown,
        _due.c.as_of,
    )
)
_mine = (_send.id == _id, _send.epoch == bind("epoch", BigInteger()), _send.state == _IS[SendState.SENDING])
_LOCK = sql(select(_send.id).where(*_mine).with_for_update())
_is_done = bind("done", Boolean())
_ADVANCE = sql(
    update(sends)
    .where(*_mine)
    .values(
        **{name: _send[name] + bind(name, BigInteger()) for name in _COUNTS},
        unknown_ids=func.array_cat(_send.unknown_ids, bind("unknown_ids", ARRAY(UUID))),
        passed=bind("passed", UUID),
        state=case((_is_done, _IS[SendState.SENT]), else_=_send.state),
        end_time=case((_is_done, func.now())),
        lease_until=null(),
        turn_time=func.clock_timestamp(),
    )
)
_FAIL = sql(
    update(sends)
    .where(*_mine)
    .values(
        state=_IS[SendState.FAILED],
        failure=bind("failure", Text()),
        lease_until=null(),
        end_time=func.now(),
    )
    .returning(_send.id)
)

_STANDING = sql(select(_send.state, func.count()).group_by(_send.state))


@dataclass(frozen=True, slots=True)
class New:
    """A send to be made; `request_hash` stands for what was asked for. `send_time` is None for at once."""

    id: uuid.UUID
    template: str
    category: str
    channels: Sequence[str]
    params: Mapping[str, Any]
    user_ids: Sequence[uuid.UUID] | None
    filter: Mapping[str, Any] | None
    send_time: datetime | None
    actor: str
    request_id: uuid.UUID
    request_hash: bytes
    trace_parent: str
    trace_state: str


@dataclass(frozen=True, slots=True)
class Page:
    """What a page of recipients became. `upto` is whom it has passed; `unknown` are ids that no user has."""

    made: Sequence[Notification] = ()
    upto: uuid.UUID | None = None
    done: bool = False
    unknown: Sequence[uuid.UUID] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """By outcome."""
        counts = {"made": len(self.made), "unknown": len(self.unknown), **self.skipped}
        return {name: count for name, count in counts.items() if count}


class TurnLostError(Exception):
    """Another replica has the send's turn by now, or it has ended."""


class DeletedMeanwhileError(Exception):
    """A recipient was deleted while the page was composed: it is to be read again."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A send and its place in the list."""

    position: int
    send: sends_pb2.Send


async def made_by(connection: Connection, actor: str, request_id: uuid.UUID, request_hash: bytes) -> uuid.UUID | None:
    """The send that a request has made, None if it is new. Raises REQUEST_ID_REUSED."""
    row = await (await connection.execute(_MADE_BY, {"actor": actor, "request_id": request_id})).fetchone()
    if row is None:
        return None
    if bytes(row[1]) != request_hash:
        raise errors.request_id_reused(str(request_id))
    return row[0] if isinstance(row[0], uuid.UUID) else uuid.UUID(str(row[0]))


async def create(
    connection: Connection, new: New, log_id: uuid.UUID | None, feed_position: int
) -> tuple[sends_pb2.Send, bool]:
    """Stores a send, to be made once the copy of the users has passed a position of a log; or finds the one that the
    same request has made. Whether it is new is told besides. Raises REQUEST_ID_REUSED.
    """
    values = {
        "id": new.id,
        "template": new.template,
        "category": new.category,
        "channels": arrays.texts(new.channels),
        "params": json.dumps(new.params),
        "user_ids": None if new.user_ids is None else arrays.uuids(new.user_ids),
        "filter": None if new.filter is None else json.dumps(new.filter),
        "send_time": new.send_time,
        "log_id": log_id,
        "feed_position": feed_position,
        "actor": new.actor,
        "request_id": new.request_id,
        "request_hash": new.request_hash,
        "trace_parent": new.trace_parent,
        "trace_state": new.trace_state,
    }
    for _ in range(_CREATE_TRIES):
        is_new = await (await connection.execute(_CREATE, values)).fetchone() is not None
        identity: uuid.UUID | None = new.id
        if not is_new:
            # Who made it was committed before the insert gave way to it.
            identity = await made_by(connection, new.actor, new.request_id, new.request_hash)
        found = None if identity is None else await find(connection, identity)
        if found is not None:
            return found, is_new
        # Its time was over at this very moment: it is as if there had never been one.
    raise LookupError("a send is removed as soon as it is made")


async def find(connection: Connection, identity: uuid.UUID) -> sends_pb2.Send | None:
    """A send, whole."""
    row = await (await connection.execute(_FIND, {"id": identity})).fetchone()
    return None if row is None else _message(row).send


# In lists, what is long is left out, and ids are only counted.
_BRIEF = {"params": null(), "unknown_ids": null(), "user_ids": func.cardinality(_send.user_ids)}


_PASSED = sql(select(_send.passed).where(_send.id == _id))


@cache
def _list(names: frozenset[str]) -> str:
    wanted = (_send[name] == bindparam(name, type_=_send[name].type) for name in sorted(names) if name != "state")
    columns = (_BRIEF.get(name, _send[name]) for name in _COLUMNS)
    statement = select(*columns).where(_send.position < _BEFORE, *wanted)
    if "state" in names:
        statement = statement.where(_send.state == bind("state", SmallInteger()))
    return sql(statement.order_by(_send.position.desc()).limit(_MOST))


async def page(connection: Connection, filters: Mapping[str, Any], before: int, most: int) -> list[Listed]:
    """Sends below a position, newest first, without what is long; filters are by column."""
    values = {**filters, "before": before, "most": most}
    found = await (await connection.execute(_list(frozenset(filters)), values)).fetchall()
    return [_message(row) for row in found]


async def has_passed(connection: Connection, identity: uuid.UUID, user_id: uuid.UUID) -> bool:
    """Whether a send has come past a user."""
    row = await (await connection.execute(_PASSED, {"id": identity})).fetchone()
    return row is not None and row[0] is not None and user_id <= row[0]


async def take(connection: Connection, lease: float) -> Order | None:
    """Takes the turn of a send that is due, for `lease` seconds; None if there is none."""
    row = await (await connection.execute(_TAKE, {"lease": round(lease * 1000)})).fetchone()
    return None if row is None else Order(*row)


async def advance(connection: Connection, order: Order, page: Page) -> None:
    """Stores what a page became, and that the send is past it; its turn ends. Raises TurnLostError or
    DeletedMeanwhileError, with nothing stored.
    """
    counts = page.counts()
    values: dict[str, Any] = {
        "id": order.id,
        "epoch": order.epoch,
        **{name: counts.get(name, 0) for name in _COUNTS},
        "matched": sum(counts.values()),
        "unknown_ids": arrays.uuids(page.unknown[: max(MOST_UNKNOWN - order.unknown, 0)]),
        "passed": page.upto,
        "done": page.done,
    }
    async with connection.transaction():
        if await (await connection.execute(_LOCK, values)).fetchone() is None:
            raise TurnLostError
        if page.made:
            await writes.write_made(connection, page.made)
            # Under the lock of the inbox's row, by which deletions are marked, too.
            ids = [one.user_id for one in page.made]
            if len(await audience.living(connection, ids)) < len(ids):
                raise DeletedMeanwhileError
        await connection.execute(_ADVANCE, values)


async def fail(connection: Connection, order: Order, failure: str) -> None:
    """Ends a send that cannot be made. Raises TurnLostError."""
    values = {"id": order.id, "epoch": order.epoch, "failure": failure}
    if await (await connection.execute(_FAIL, values)).fetchone() is None:
        raise TurnLostError


async def standing(connection: Connection) -> dict[str, int]:
    """How many sends there are by state."""
    found = dict.fromkeys((state.name.lower() for state in SendState), 0)
    for state, count in await (await connection.execute(_STANDING)).fetchall():
        found[SendState(state).name.lower()] = count
    return found


def _message(row: tuple[Any, ...]) -> Listed:
    found = dict(zip(_COLUMNS, row, strict=True))
    message = sends_pb2.Send(
        id=str(found["id"]),
        template=found["template"],
        category=found["category"],
        channels=found["channels"],
        recipients=_recipients(found["user_ids"], found["filter"] or {}),
        send_time=stamp(found["send_time"]),
        state=found["state"],
        failure=found["failure"],
        counts=sends_pb2.Send.Counts(**{name: found[name] for name in _COUNTS}),
        actor=found["actor"],
        create_time=stamp(found["create_time"]),
        start_time=stamp(found["start_time"]),
        end_time=stamp(found["end_time"]),
        trace_parent=found["trace_parent"],
        trace_state=found["trace_state"],
    )
    message.params.update(found["params"] or {})
    message.unknown_user_ids.extend(str(one) for one in found["unknown_ids"] or ())
    return Listed(found["position"], message)


def _recipients(ids: Sequence[uuid.UUID] | int | None, asked: Mapping[str, Any]) -> sends_pb2.Send.Recipients:
    """Of ids, or only their number, or of a filter."""
    if ids is None:
        return sends_pb2.Send.Recipients(filter=sends_pb2.Send.Filter(**asked))
    named, total = ([], ids) if isinstance(ids, int) else ([str(one) for one in ids], len(ids))
    return sends_pb2.Send.Recipients(user_ids=sends_pb2.Send.UserIds(ids=named, total=total))
