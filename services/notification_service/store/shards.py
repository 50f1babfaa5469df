"""The SQL of sharing the user feed: which replicas live, who owns which shard, and how the feed is divided.

The truth about how far the feed is processed is the row of `inbox` unless its token is DIVIDED; then it is the rows of
`shards`. No feed takes that token, so that whoever knows no shards stops instead of going on from a place of long ago.

Times are the database's. No statement here waits long for a lock: a replica that waited would lose its own lease.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Integer,
    Text,
    any_,
    case,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import insert as insert_or_update

from notification_service.domain import Hold
from notification_service.store.parts import SECOND, TIME, UUID, bind, number, rows
from notification_service.tables import inbox, replicas, shards
from servicekit import arrays
from servicekit.database import Connection, sql

DIVIDED = "divided"
_DIVIDED: Any = literal_column(f"'{DIVIDED}'")
# Of the inbox's row. Not null, also where there is no token yet.
is_divided: Any = func.coalesce(inbox.c.resume_token == _DIVIDED, literal_column("false"))

# A lock of the notifications database. Replicas that know shards share it; of an earlier release the one that follows
# the whole feed has it alone.
_FEED_LOCK = 0x7469_6469_6E67_7301

# For how long a replica that is gone is remembered, seconds: for whoever looks into the table.
_REMEMBERED = 60


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that lives."""

    id: uuid.UUID
    shards: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard; `owner` is None if nobody has it, or one whose lease is over."""

    shard: int
    of: int
    epoch: int
    owner: uuid.UUID | None


@dataclass(frozen=True, slots=True)
class Division:
    """How the feed is shared. `shards` is empty before the first replica; replicas come in the order of joining."""

    shards: tuple[Shard, ...]
    replicas: tuple[Replica, ...]
    # Whether the shards' rows say how far they are, and not the inbox's.
    divided: bool


_lives = replicas.c.lease_until > func.now()
_BEAT = sql(
    insert_or_update(replicas)
    .values(
        id=bind("id", UUID),
        name=bind("name", Text()),
        shards=bind("shards", Integer()),
        join_time=func.now(),
        lease_until=func.now() + bind("lease", Integer()) * literal_column("interval '1 millisecond'"),
    )
    .on_conflict_do_update(
        index_elements=[replicas.c.id],
        set_={"lease_until": literal_column("excluded.lease_until")},
    )
)
_FORGET = sql(
    delete(replicas).where(
        replicas.c.id.in_(
            select(replicas.c.id)
            .where(replicas.c.lease_until < func.now() - number(_REMEMBERED) * SECOND)
            .with_for_update(skip_locked=True)
        )
    )
)
_SHARDS = sql(
    select(
        shards.c.shard,
        shards.c.of,
        shards.c.epoch,
        case((exists().where(replicas.c.id == shards.c.owner, _lives), shards.c.owner)),
    ).order_by(shards.c.shard)
)
_REPLICAS = sql(select(replicas.c.id, replicas.c.shards).where(_lives).order_by(replicas.c.join_time, replicas.c.id))
_IS_DIVIDED = sql(select(is_divided).select_from(inbox))

_asked = rows(s_shard=Integer(), s_epoch=BigInteger())
# Rows that somebody stores into are left for the next time.
_free = (
    select(shards.c.shard)
    .join(_asked, (shards.c.shard == _asked.c.s_shard) & (shards.c.epoch == _asked.c.s_epoch))
    .with_for_update(of=shards, skip_locked=True)
    .cte("free")
)
_TAKE = sql(
    update(shards)
    .where(shards.c.shard == _free.c.shard)
    .values(owner=bind("owner", UUID), epoch=shards.c.epoch + number(1))
    .returning(shards.c.shard, shards.c.of, shards.c.epoch)
)
_GIVE_UP = sql(
    update(shards)
    .where(
        shards.c.owner == bind("owner", UUID),
        shards.c.shard == any_(bind("shards", ARRAY(Integer))),
    )
    .values(owner=literal_column("NULL"))
)
_LEAVE = (
    sql(update(shards).where(shards.c.owner == bind("id", UUID)).values(owner=literal_column("NULL"))),
    sql(delete(replicas).where(replicas.c.id == bind("id", UUID))),
)

_LOCK_SHARDS = sql(
    select(
        shards.c.epoch,
        shards.c.log_id,
        shards.c.position,
        shards.c.position_time,
        shards.c.head_position,
        shards.c.floors,
    )
    .order_by(shards.c.shard)
    .with_for_update()
)
_EPOCHS = sql(select(shards.c.epoch).order_by(shards.c.shard))
_ENSURE_INBOX = sql(insert_or_update(inbox).values(id=number(1)).on_conflict_do_nothing())
_LOCK_INBOX = sql(select(inbox.c.log_id, inbox.c.position, inbox.c.position_time, is_divided).with_for_update())
_REMOVE = sql(delete(shards))
_MAKE = sql(
    insert(shards).from_select(
        ["shard", "of", "log_id", "position", "position_time", "head_position", "floors", "epoch"],
        select(
            func.generate_series(number(0), bind("of", Integer()) - number(1)),
            bind("of", Integer()),
            bind("log_id", UUID),
            bind("position", BigInteger()),
            bind("position_time", TIME),
            bind("head_position", BigInteger()),
            bind("floors", JSONB()),
            bind("epoch", BigInteger()),
        ),
    )
)
_MARK = sql(update(inbox).values(resume_token=_DIVIDED).where(bind("divided", Boolean())))


async def may_follow(connection: Connection) -> bool:
    """Whether no replica of an earlier release follows the feed; for as long as the session lasts none does then."""
    cursor = await connection.execute("SELECT pg_try_advisory_lock_shared(%(key)s)", {"key": _FEED_LOCK})
    row = await cursor.fetchone()
    return bool(row and row[0])


async def beat(connection: Connection, replica: Replica, name: str, lease: float) -> None:
    """Says that a replica lives, for `lease` seconds more, and forgets those that are long gone."""
    values = {"id": replica.id, "name": name, "shards": replica.shards, "lease": round(lease * 1000)}
    await connection.execute(_BEAT, values)
    await connection.execute(_FORGET)


async def look(connection: Connection) -> Division:
    """How the feed is shared now."""
    found = await (await connection.execute(_SHARDS)).fetchall()
    living = await (await connection.execute(_REPLICAS)).fetchall()
    row = await (await connection.execute(_IS_DIVIDED)).fetchone()
    return Division(tuple(Shard(*one) for one in found), tuple(Replica(*one) for one in living), bool(row and row[0]))


async def take(connection: Connection, owner: uuid.UUID, free: Sequence[Shard]) -> list[Hold]:
    """Takes those of the shards that nobody else has taken, and that are not being stored into."""
    values = {
        "owner": owner,
        "s_shard": arrays.integers([one.shard for one in free]),
        "s_epoch": arrays.bigints([one.epoch for one in free]),
    }
    taken = await (await connection.execute(_TAKE, values)).fetchall()
    return [Hold(owner, *one) for one in sorted(taken)]


async def give_up(connection: Connection, owner: uuid.UUID, given: Sequence[int]) -> None:
    """Leaves shards to others. Who stores into one meanwhile is waited for."""
    await connection.execute(_GIVE_UP, {"owner": owner, "shards": arrays.integers(given)})


async def leave(connection: Connection, replica: uuid.UUID) -> None:
    """A replica ends: others may have its shards at once."""
    for statement in _LEAVE:
        await connection.execute(statement, {"id": replica})


async def divide(connection: Connection, seen: Division, of: int) -> bool:
    """Divides the feed anew, into `of` shards that nobody owns, unless it is not as it was `seen` any more.

    Whoever owns a shard cannot store from then on. Each new shard begins where the old one was that was furthest
    behind, and knows how far each of them was, for what was passed is not to be processed again.

    Raises psycopg's LockNotAvailable if somebody stores for long.
    """
    async with connection.transaction():
        await connection.execute("SET LOCAL lock_timeout = '1s'")
        await connection.execute(_ENSURE_INBOX)
        old = await (await connection.execute(_LOCK_SHARDS)).fetchall()
        row = await (await connection.execute(_LOCK_INBOX)).fetchone()
        # What was made while this waited is seen by no statement before this one.
        epochs = [epoch for (epoch,) in await (await connection.execute(_EPOCHS)).fetchall()]
        if row is None or epochs != [one[0] for one in old] or len(old) != len(seen.shards):
            return False
        log_id, position, time, divided = row
        if divided != seen.divided:
            return False
        place = _Place(log_id, (position,), time, max([one[4] for one in old], default=position), ())
        if divided:
            place = _joined(old)
        whole = of == 1 and not divided
        begun = place.log_id is not None or max(place.positions) > 0
        values: dict[str, Any] = {
            "of": of,
            "log_id": place.log_id,
            "position": min(place.positions),
            "position_time": place.time,
            "head_position": place.head,
            "floors": json.dumps([*place.floors, place.positions]) if begun and not whole else None,
            "epoch": max(epochs, default=0) + 1,
        }
        await connection.execute(_REMOVE)
        await connection.execute(_MAKE, values)
        await connection.execute(_MARK, {"divided": not whole})
    return True


@dataclass(frozen=True, slots=True)
class _Place:
    """How far the shards of a division are. `time` is that of an event at or before the lowest of the positions."""

    log_id: uuid.UUID | None
    positions: tuple[int, ...]
    time: datetime | None
    head: int
    floors: tuple[tuple[int, ...], ...]


def _joined(old: Sequence[tuple[Any, ...]]) -> _Place:
    positions = tuple(one[2] for one in old)
    lowest = min(positions)
    return _Place(
        next((one[1] for one in old if one[1] is not None), None),
        positions,
        max((one[3] for one in old if one[2] == lowest and one[3] is not None), default=None),
        max(one[4] for one in old),
        tuple(dict.fromkeys(tuple(floor) for one in old for floor in one[5] or ())),
    )
