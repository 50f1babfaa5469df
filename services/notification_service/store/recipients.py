"""The SQL of this service's own copy of the users, and of who keeps it.

The row of `recipients_feed` is moved first, from the token that a batch follows and by whoever holds the newest epoch;
what the batch says of users is stored in the same transaction. Rows of users are always locked in the order of their
ids, for the inbox marks those who are deleted, too.

A row replaces another only if its version is higher. Versions compare within one history of the log: after the log was
replaced or restored, rows of snapshots before `history` are replaced whatever their version.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Integer,
    Text,
    any_,
    case,
    cast,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from notification_service.domain import Person
from notification_service.store.parts import MILLISECOND, TIME, UUID, bind, number, rows
from notification_service.tables import recipients, recipients_feed
from servicekit import arrays
from servicekit.database import Connection, sql

# How many rows one transaction makes tombstones of at the end of a snapshot.
_SWEPT_AT_ONCE = 5000

_row, _feed = recipients.c, recipients_feed.c
_NULL: Any = null()

_ENSURE = sql(insert(recipients_feed).values(id=number(1)).on_conflict_do_nothing())
_lease = func.now() + bind("lease", Integer()) * MILLISECOND
_mine = (_feed.owner == bind("owner", UUID), _feed.epoch == bind("epoch", BigInteger()))
_TAKE = sql(
    update(recipients_feed)
    .where(or_(_feed.owner.is_(None), _feed.lease_until <= func.now()))
    .values(owner=bind("owner", UUID), epoch=_feed.epoch + number(1), lease_until=_lease)
    .returning(_feed.epoch, _feed.resume_token, _feed.snapshot, _feed.history, _feed.inside, _feed.position)
)
_RENEW = sql(update(recipients_feed).where(*_mine).values(lease_until=_lease).returning(_feed.epoch))
_LEAVE = sql(update(recipients_feed).where(_feed.owner == bind("owner", UUID)).values(owner=_NULL, lease_until=_NULL))
_LOCK = sql(select(_feed.epoch).where(*_mine).with_for_update())
_follows = _feed.resume_token.is_not_distinct_from(bind("was_token", Text()))
_MOVE = sql(
    update(recipients_feed)
    .where(*_mine, _follows)
    .values(
        resume_token=bind("token", Text()),
        snapshot=_feed.snapshot + bind("begun", Integer()),
        # Within a snapshot the copy is as of where it was before.
        position=case((bind("inside", Boolean()), _feed.position), else_=bind("position", BigInteger())),
        inside=bind("inside", Boolean()),
        head_position=bind("head_position", BigInteger()),
        log_id=func.coalesce(bind("log_id", UUID), _feed.log_id),
        lease_until=_lease,
        update_time=func.clock_timestamp(),
    )
    .returning(_feed.snapshot, _feed.history, _feed.position)
)
_FORGET = sql(
    update(recipients_feed)
    .where(*_mine, _follows)
    .values(
        resume_token=_NULL,
        inside=literal_column("false"),
        history=case((bind("other_history", Boolean()), _feed.snapshot + number(1)), else_=_feed.history),
    )
    .returning(_feed.history)
)

_PERSONAL = ("username", "email", "display_name", "locale", "time_zone")
_TIMES = ("create_time", "update_time", "delete_time")
_KEPT = (*_PERSONAL, "labels", *_TIMES)
_given = rows(
    r_user_id=UUID,
    r_version=BigInteger(),
    **{f"r_{name}": Text() for name in (*_PERSONAL, "labels")},
    **{f"r_{name}": TIME for name in _TIMES},
)
_upsert = insert(recipients).from_select(
    ["user_id", "version", *_KEPT, "snapshot", "delete_position"],
    select(
        _given.c.r_user_id,
        _given.c.r_version,
        *(cast(_given.c.r_labels, JSONB) if name == "labels" else getattr(_given.c, f"r_{name}") for name in _KEPT),
        bind("snapshot", BigInteger()),
        case((_given.c.r_delete_time.is_not(None), bind("position", BigInteger()))),
    ).order_by(_given.c.r_user_id),
)
_UPSERT = sql(
    _upsert.on_conflict_do_update(
        index_elements=[_row.user_id],
        set_={name: _upsert.excluded[name] for name in ("version", *_KEPT, "snapshot", "delete_position")},
        where=or_(_row.snapshot < bind("history", BigInteger()), _row.version < _upsert.excluded.version),
    )
)
# Whom a snapshot names is there, also where the copy is ahead of the snapshot.
_named = (
    select(_row.user_id)
    .where(_row.user_id == any_(bind("ids", ARRAY(UUID))), _row.snapshot < bind("snapshot", BigInteger()))
    .order_by(_row.user_id)
    .with_for_update()
    .cte("named")
)
_NAME = sql(update(recipients).where(_row.user_id == _named.c.user_id).values(snapshot=bind("snapshot", BigInteger())))

_emptied: dict[str, Any] = dict.fromkeys((*_PERSONAL, "labels", "create_time", "update_time"), _NULL)
_unnamed = (
    select(_row.user_id)
    .where(
        _row.user_id > bind("after", UUID), _row.snapshot < bind("snapshot", BigInteger()), _row.delete_time.is_(None)
    )
    .order_by(_row.user_id)
    .limit(number(_SWEPT_AT_ONCE))
    .with_for_update()
    .cte("unnamed")
)
_SWEEP = sql(
    update(recipients)
    .where(_row.user_id == _unnamed.c.user_id)
    .values(**_emptied, delete_time=func.now(), delete_position=bind("position", BigInteger()))
    .returning(_row.user_id)
)

_dead = rows(t_user_id=UUID, t_version=BigInteger(), t_position=BigInteger())
_newest = func.coalesce(
    select(func.greatest(_feed.snapshot, _feed.history)).scalar_subquery(), literal_column("0", BigInteger())
)
_bury = insert(recipients).from_select(
    ["user_id", "version", "delete_time", "snapshot", "delete_position"],
    select(_dead.c.t_user_id, _dead.c.t_version, func.now(), _newest, _dead.c.t_position).order_by(_dead.c.t_user_id),
)
_BURY = sql(
    _bury.on_conflict_do_update(
        index_elements=[_row.user_id],
        set_={
            **_emptied,
            "version": _bury.excluded.version,
            "delete_time": _bury.excluded.delete_time,
            "snapshot": _bury.excluded.snapshot,
            "delete_position": _bury.excluded.delete_position,
        },
        where=or_(
            _row.version < _bury.excluded.version,
            _row.snapshot < func.coalesce(select(_feed.history).scalar_subquery(), literal_column("0", BigInteger())),
        ),
    )
)

_PLACE = sql(select(_feed.log_id, _feed.position, _feed.head_position))
_SILENCE = sql(select(func.extract("epoch", func.now() - _feed.update_time)))

# Whoever is before, and not after, all users.
NOBODY, EVERYBODY = uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)


class HoldLostError(Exception):
    """Another replica keeps the copy by now, or has moved its place."""


@dataclass(frozen=True, slots=True)
class Held:
    """The copy's place, held by one replica for an epoch. `position` is None before the first snapshot has ended."""

    owner: uuid.UUID
    epoch: int
    token: str | None
    snapshot: int
    history: int
    # Whether the token stands inside of a snapshot.
    inside: bool
    position: int | None


@dataclass(frozen=True, slots=True)
class Named:
    """A user as the copy is to have it; a deleted one has no `person`, and the time when."""

    user_id: uuid.UUID
    version: int
    person: Person | None
    delete_time: Any = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """When a user was deleted: the event's position, and the user's version."""

    position: int
    version: int


async def take(connection: Connection, owner: uuid.UUID, lease: float) -> Held | None:
    """Takes the place for `lease` seconds; None if another replica has it."""
    await connection.execute(_ENSURE)
    row = await (await connection.execute(_TAKE, {"owner": owner, "lease": round(lease * 1000)})).fetchone()
    return None if row is None else Held(owner, *row)


async def renew(connection: Connection, held: Held, lease: float) -> bool:
    """Keeps it for `lease` seconds more; whether it was still held."""
    values = {"owner": held.owner, "epoch": held.epoch, "lease": round(lease * 1000)}
    return await (await connection.execute(_RENEW, values)).fetchone() is not None


async def leave(connection: Connection, owner: uuid.UUID) -> None:
    """Lets other replicas have it at once."""
    await connection.execute(_LEAVE, {"owner": owner})


async def forget_place(connection: Connection, held: Held, *, other_history: bool) -> Held:
    """The copy begins anew with a snapshot; of `other_history`, versions do not compare. Raises HoldLostError."""
    values = {**_hold(held), "was_token": held.token, "other_history": other_history}
    row = await (await connection.execute(_FORGET, values)).fetchone()
    if row is None:
        raise HoldLostError
    return replace(held, token=None, history=row[0], inside=False)


def _hold(held: Held) -> dict[str, Any]:
    return {"owner": held.owner, "epoch": held.epoch}


async def store(
    connection: Connection,
    held: Held,
    named: Sequence[Named],
    *,
    token: str,
    lease: float,
    head_position: int,
    position: int,
    part: Literal["begin", "within", "end"] | None = None,
    log_id: uuid.UUID | None = None,
) -> Held:
    """Stores what a batch says of users, each once, and that the copy is past it: as of `position`, unless it is inside
    of a snapshot; `part` is which part of one it is. Raises HoldLostError, with nothing stored.
    """
    inside = part in ("begin", "within") or (held.inside and part != "end")
    values = {
        **_hold(held),
        "was_token": held.token,
        "token": token,
        "lease": round(lease * 1000),
        "begun": int(part == "begin"),
        "inside": inside,
        "position": position,
        "head_position": head_position,
        "log_id": log_id,
    }
    async with connection.transaction():
        row = await (await connection.execute(_MOVE, values)).fetchone()
        if row is None:
            raise HoldLostError
        after = replace(held, token=token, snapshot=row[0], history=row[1], inside=inside, position=row[2])
        if named:
            counted = {"snapshot": after.snapshot, "history": after.history, "position": position}
            await connection.execute(_UPSERT, {**_columns(named), **counted})
        if named and inside:
            ids = arrays.uuids([one.user_id for one in named])
            await connection.execute(_NAME, {"ids": ids, "snapshot": after.snapshot})
    return after


def _columns(named: Sequence[Named]) -> dict[str, Any]:
    people = [one.person for one in named]

    def of(name: str) -> list[Any]:
        return [None if one is None else getattr(one, name) for one in people]

    columns: dict[str, Any] = {
        "r_user_id": arrays.uuids([one.user_id for one in named]),
        "r_version": arrays.bigints([one.version for one in named]),
        "r_labels": arrays.nullable_texts([None if one is None else json.dumps(dict(one.labels)) for one in people]),
        "r_delete_time": arrays.times([one.delete_time for one in named]),
    }
    for name in _PERSONAL:
        columns[f"r_{name}"] = arrays.nullable_texts(of(name))
    for name in ("create_time", "update_time"):
        columns[f"r_{name}"] = arrays.times(of(name))
    return columns


async def sweep(connection: Connection, held: Held, after: uuid.UUID, position: int) -> uuid.UUID | None:
    """Of the users after one, makes tombstones of some that the snapshot, which is as of a position, has not named.
    Returns after whom to go on, None at the end. Raises HoldLostError.
    """
    async with connection.transaction():
        if await (await connection.execute(_LOCK, _hold(held))).fetchone() is None:
            raise HoldLostError
        values = {"after": after, "snapshot": held.snapshot, "position": position}
        swept = [identity for (identity,) in await (await connection.execute(_SWEEP, values)).fetchall()]
    return max(swept) if len(swept) == _SWEPT_AT_ONCE else None


async def bury(connection: Connection, deleted: Mapping[uuid.UUID, Deletion]) -> None:
    """Marks users as deleted, unless the copy knows better."""
    values = {
        "t_user_id": arrays.uuids(list(deleted)),
        "t_version": arrays.bigints([one.version for one in deleted.values()]),
        "t_position": arrays.bigints([one.position for one in deleted.values()]),
    }
    await connection.execute(_BURY, values)


async def place(connection: Connection) -> tuple[uuid.UUID | None, int | None, int]:
    """Of which log the copy is, as of which position it is whole (None: not yet), and the newest position known."""
    row = await (await connection.execute(_PLACE)).fetchone()
    return (row[0], row[1], row[2]) if row else (None, None, 0)


async def silence(connection: Connection) -> float | None:
    """For how long nothing was stored for the copy, seconds; None before anybody has begun to keep it."""
    row = await (await connection.execute(_SILENCE)).fetchone()
    return max(float(row[0]), 0.0) if row else None
