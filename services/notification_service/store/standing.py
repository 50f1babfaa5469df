"""The SQL of how the service stands: how far the feed is processed, and how many deliveries are in which state."""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_, case, exists, func, literal_column, not_, or_, select, true

from notification_service.destinations import TARGET_PREFIX
from notification_service.destinations import State as EndpointState
from notification_service.domain import State, stamp
from notification_service.store.parts import number
from notification_service.store.shards import is_divided
from notification_service.tables import deliveries, endpoints, inbox, replicas, shards
from servicekit.database import Connection, sql
from tidings.notifications.v1 import notifications_pb2

_delivery = deliveries.c

_PENDING = number(State.PENDING)
_PARKED = number(State.PARKED)
_DISCARDED = number(State.DISCARDED)
_CANCELLED = number(State.CANCELLED)
_lowest = select(func.min(shards.c.position)).scalar_subquery()
# Up to where everything is processed, and of which feed.
PROCESSED = case((is_divided, func.coalesce(_lowest, inbox.c.position)), else_=inbox.c.position)
PROCESSED_LOG = case(
    (is_divided, select(shards.c.log_id).order_by(shards.c.log_id).limit(number(1)).scalar_subquery()),
    else_=inbox.c.log_id,
)
_INBOX = sql(
    select(
        PROCESSED_LOG,
        PROCESSED,
        case((is_divided, select(func.max(shards.c.position_time)).scalar_subquery()), else_=inbox.c.position_time),
        inbox.c.notification_position,
        inbox.c.delivery_position,
        inbox.c.removed,
        select(func.count()).select_from(deliveries).where(_delivery.state == _PENDING).scalar_subquery(),
        select(func.count()).select_from(deliveries).where(_delivery.state == _PARKED).scalar_subquery(),
        select(func.count()).select_from(deliveries).where(_delivery.state == _DISCARDED).scalar_subquery(),
        select(func.count()).select_from(deliveries).where(_delivery.state == _CANCELLED).scalar_subquery(),
        select(func.min(_delivery.next_attempt_time))
        .where(_delivery.state == _PENDING, _delivery.next_attempt_time <= func.now())
        .scalar_subquery(),
    )
)


_is_pending = _delivery.state == _PENDING
# What waits for what is no failure: for the end of quiet hours, for an earlier delivery, for an endpoint to be enabled.
_is_disabled = exists().where(
    endpoints.c.state == number(EndpointState.DISABLED),
    _delivery.target == func.concat(literal_column(f"'{TARGET_PREFIX}'"), endpoints.c.id),
)
_is_tried = and_(_is_pending, _delivery.deferred.is_(None), _delivery.behind.is_(None), not_(_is_disabled))
_STANDING = sql(
    select(
        _delivery.channel,
        func.count().filter(_is_pending),
        func.count().filter(_delivery.state == _PARKED),
        func.extract("epoch", func.now() - func.min(_delivery.create_time).filter(_is_tried)),
    )
    .where(or_(_is_pending, _delivery.state == _PARKED))
    .group_by(_delivery.channel)
)
_POSITION = sql(select(PROCESSED).select_from(inbox))
_shard_position = case((is_divided, shards.c.position), else_=inbox.c.position)
_PLACES = sql(select(PROCESSED, shards.c.shard, _shard_position).select_from(inbox).outerjoin(shards, true()))
_SHARDS = sql(
    select(
        shards.c.shard,
        _shard_position,
        case((is_divided, shards.c.position_time), else_=inbox.c.position_time),
        func.greatest(shards.c.head_position - _shard_position, number(0)),
        func.coalesce(replicas.c.name, literal_column("''")),
        shards.c.epoch,
        shards.c.update_time,
    )
    .select_from(
        shards.join(inbox, literal_column("true")).outerjoin(
            replicas, (replicas.c.id == shards.c.owner) & (replicas.c.lease_until > func.now())
        )
    )
    .order_by(shards.c.shard)
)


async def inbox_state(connection: Connection) -> notifications_pb2.Inbox:
    """How far the feed is processed and how deliveries stand, in one statement."""
    row = await (await connection.execute(_INBOX, binary=True)).fetchone()
    if row is None:
        return notifications_pb2.Inbox()
    log_id, position, position_time, notes, made, removed, pending, parked, discarded, cancelled, oldest = row
    found = await (await connection.execute(_SHARDS)).fetchall()
    return notifications_pb2.Inbox(
        log_id=str(log_id) if log_id else "",
        position=position,
        position_time=stamp(position_time),
        notifications=notes,
        pending=pending,
        delivered=made - removed - pending - parked - discarded - cancelled,
        parked=parked,
        discarded=discarded,
        cancelled=cancelled,
        oldest_pending_time=stamp(oldest),
        shards=[_shard(one) for one in found],
    )


def _shard(row: tuple[Any, ...]) -> notifications_pb2.Inbox.Shard:
    shard, position, position_time, lag, owner, epoch, update_time = row
    return notifications_pb2.Inbox.Shard(
        index=shard,
        position=position,
        position_time=stamp(position_time),
        lag_events=lag,
        owner=owner,
        epoch=epoch,
        update_time=stamp(update_time),
    )


async def of_channels(connection: Connection) -> list[tuple[str, int, int, float | None]]:
    """Of each channel that has any: how many deliveries are pending, how many parked, and how old the oldest pending
    one is that is tried, in seconds.
    """
    rows = await (await connection.execute(_STANDING)).fetchall()
    return [(channel, pending, parked, None if age is None else float(age)) for channel, pending, parked, age in rows]


async def position(connection: Connection) -> int:
    """How far the feed is processed."""
    row = await (await connection.execute(_POSITION)).fetchone()
    return int(row[0]) if row else 0


async def places(connection: Connection) -> tuple[int, dict[int, int]]:
    """How far the feed is processed, and how far each of its shards is."""
    found = await (await connection.execute(_PLACES)).fetchall()
    shards = {shard: position for _, shard, position in found if shard is not None}
    return found[0][0] if found else 0, shards
