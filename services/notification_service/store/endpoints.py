"""The SQL of webhook endpoints and of their secrets.

A change locks the endpoint's row and compares its version; every change, one of the secrets too, makes the next
version. So what `fingerprint` adds up differs whenever anything does, and replicas read everything again only then.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Float,
    LargeBinary,
    Text,
    cast,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.sql.type_api import TypeEngine

from notification_service import errors
from notification_service.destinations import Destination, Secret, State, target_of
from notification_service.domain import WEBHOOK
from notification_service.domain import State as DeliveryState
from notification_service.store.parts import SECOND, UUID, bind, number
from notification_service.tables import deliveries, endpoint_secrets, endpoints
from servicekit import arrays
from servicekit.database import Connection, sql

MOST_ENDPOINTS = 1000
# More would not fit into a header that every server takes.
MOST_SECRETS = 5

_endpoint = endpoints.c
_secret = endpoint_secrets.c
_id = bind("id", UUID)
_is_this = _endpoint.id == _id

_FIELDS: dict[str, TypeEngine[Any]] = {
    "name": Text(),
    "url": Text(),
    "description": Text(),
    "events": ARRAY(Text()),
    "categories": ARRAY(Text()),
    "rate_limit": Float(),
}
_given = {name: bind(name, kind) for name, kind in _FIELDS.items()}
_next = {"version": _endpoint.version + number(1), "update_time": func.clock_timestamp()}
_is_valid = or_(_secret.expire_time.is_(None), _secret.expire_time > func.now())

_COLUMNS = (
    "id", "position", "name", "url", "description", "events", "categories", "state", "disable_reason", "disable_time",
    "rate_limit", "version", "create_time", "update_time",
)  # fmt: skip
_ALL = sql(select(*(_endpoint[name] for name in _COLUMNS)).order_by(_endpoint.position.desc()))
_ONE = sql(select(*(_endpoint[name] for name in _COLUMNS)).where(_is_this))
_secrets = select(_secret.endpoint_id, _secret.secret, _secret.create_time, _secret.expire_time).where(_is_valid)
_ALL_SECRETS = sql(_secrets.order_by(_secret.id))
_ONE_SECRETS = sql(_secrets.where(_secret.endpoint_id == _id).order_by(_secret.id))
_LOCKED = sql(select(_endpoint.version, *(_endpoint[name] for name in _FIELDS)).where(_is_this).with_for_update())
_COUNT = sql(select(func.count()).select_from(endpoints))
_MADE_BY = sql(select(_endpoint.id, _endpoint.request_hash).where(_endpoint.request_id == bind("request_id", UUID)))
_FIRST_SECRET = sql(
    select(_secret.secret).where(_secret.endpoint_id == _id, _secret.is_first == literal_column("true"), _is_valid)
)
_FINGERPRINT = sql(
    select(
        select(
            func.coalesce(
                func.sum(
                    func.hashtextextended(
                        cast(_endpoint.id, Text).concat(cast(_endpoint.version, Text)), number(0), type_=BigInteger()
                    )
                ),
                number(0),
            )
        ).scalar_subquery(),
        select(func.count()).select_from(endpoint_secrets).scalar_subquery(),
        select(func.count()).select_from(endpoint_secrets).where(_secret.expire_time <= func.now()).scalar_subquery(),
    )
)
_REMOVE_EXPIRED = sql(delete(endpoint_secrets).where(_secret.expire_time <= func.now()))
_INSERT = sql(
    insert(endpoints).values(
        id=_id,
        **_given,
        create_time=func.now(),
        update_time=func.now(),
        request_id=bind("request_id", UUID),
        request_hash=bind("request_hash", LargeBinary()),
    )
)
_INSERT_SECRET = sql(
    insert(endpoint_secrets).values(
        endpoint_id=_id, secret=bind("secret", Text()), is_first=bind("is_first", Boolean()), create_time=func.now()
    )
)
_EXPIRE = sql(
    update(endpoint_secrets)
    .where(_secret.endpoint_id == _id)
    .values(expire_time=func.least(_secret.expire_time, func.now() + bind("overlap", Float()) * SECOND))
)
_DELETE_SECRETS = sql(delete(endpoint_secrets).where(_secret.endpoint_id == _id))
_UPDATE = sql(update(endpoints).where(_is_this).values(**_given, **_next))
_TOUCH = sql(update(endpoints).where(_is_this).values(**_next))
_ENABLE = sql(
    update(endpoints)
    .where(_is_this, _endpoint.state == number(State.DISABLED))
    .values(state=number(State.ENABLED), disable_reason=literal_column("''"), disable_time=null(), **_next)
)
_disable = (
    update(endpoints)
    .where(_is_this, _endpoint.state == number(State.ENABLED))
    .values(
        state=number(State.DISABLED),
        disable_reason=bind("reason", Text()),
        disable_time=func.clock_timestamp(),
        **_next,
    )
)
_DISABLE = sql(_disable)
_DISABLE_GONE = sql(_disable.where(_endpoint.url == bind("url", Text())))
_DELETE = sql(delete(endpoints).where(_is_this))
# So that they end now, not at their next attempt.
_MAKE_DUE = sql(
    update(deliveries)
    .where(
        deliveries.c.state == number(DeliveryState.PENDING),
        deliveries.c.channel == literal_column(f"'{WEBHOOK}'", Text()),
        deliveries.c.target == bind("target", Text()),
        deliveries.c.next_attempt_time > func.now(),
    )
    .values(next_attempt_time=func.now())
)


@dataclass(frozen=True, slots=True)
class New:
    """An endpoint to be made; `request_hash` stands for the caller and the request."""

    id: uuid.UUID
    fields: Mapping[str, Any]
    secret: str
    request_id: uuid.UUID | None
    request_hash: bytes


async def fingerprint(connection: Connection) -> tuple[int, int, int]:
    """What differs whenever endpoints or secrets do; the last number is how many secrets have expired."""
    row = await (await connection.execute(_FINGERPRINT)).fetchone()
    if row is None:
        raise RuntimeError("an aggregate without a row")
    return int(row[0]), int(row[1]), int(row[2])


async def remove_expired(connection: Connection) -> None:
    """Removes the secrets that sign no more."""
    await connection.execute(_REMOVE_EXPIRED)


async def read_all(connection: Connection) -> list[Destination]:
    """Every endpoint with the secrets that sign, newest first."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        found = await (await connection.execute(_ALL)).fetchall()
        secrets: dict[uuid.UUID, list[Secret]] = {}
        for owner, *secret in await (await connection.execute(_ALL_SECRETS)).fetchall():
            secrets.setdefault(owner, []).append(Secret(*secret))
    return [_destination(row, secrets.get(row[0], [])) for row in found]


async def read(connection: Connection, identity: uuid.UUID) -> Destination | None:
    """One endpoint with the secrets that sign."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return await _read(connection, identity)


async def _read(connection: Connection, identity: uuid.UUID) -> Destination | None:
    row = await (await connection.execute(_ONE, {"id": identity})).fetchone()
    if row is None:
        return None
    secrets = await (await connection.execute(_ONE_SECRETS, {"id": identity})).fetchall()
    return _destination(row, [Secret(*secret) for _, *secret in secrets])


def _destination(row: Sequence[Any], secrets: Sequence[Secret]) -> Destination:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in ("events", "categories"):
        values[name] = frozenset(values[name])
    values["state"] = State(values["state"])
    return Destination(**values, target=target_of(values["id"]), secrets=tuple(secrets))


async def create(connection: Connection, new: New) -> tuple[Destination, str]:
    """Stores a new endpoint; returns it and its secret, or what the same request made before (with an empty secret once
    that has expired). Raises NAME_TAKEN, REQUEST_ID_REUSED, TOO_MANY_ENDPOINTS.
    """
    try:
        async with connection.transaction():
            if new.request_id is not None and (made := await _made_by(connection, new)) is not None:
                return made
            row = await (await connection.execute(_COUNT)).fetchone()
            if row is not None and row[0] >= MOST_ENDPOINTS:
                raise errors.too_many_endpoints(MOST_ENDPOINTS)
            values = {**_values(new.fields), "request_id": new.request_id, "request_hash": new.request_hash}
            await connection.execute(_INSERT, {"id": new.id, **values})
            await connection.execute(_INSERT_SECRET, {"id": new.id, "secret": new.secret, "is_first": True})
            return await _after(connection, new.id), new.secret
    except psycopg.errors.UniqueViolation as error:
        if new.request_id is not None:
            # Perhaps by the same request at the same time, which is done now. It has the name too, and either index may
            # be the first to tell.
            async with connection.transaction():
                if (made := await _made_by(connection, new)) is not None:
                    return made
        raise _name_taken(error, str(new.fields["name"])) from None


async def _made_by(connection: Connection, new: New) -> tuple[Destination, str] | None:
    row = await (await connection.execute(_MADE_BY, {"request_id": new.request_id})).fetchone()
    if row is None:
        return None
    if bytes(row[1]) != new.request_hash:
        raise errors.request_id_reused(str(new.request_id))
    secret = await (await connection.execute(_FIRST_SECRET, {"id": row[0]})).fetchone()
    return await _after(connection, row[0]), secret[0] if secret else ""


def _name_taken(error: psycopg.errors.UniqueViolation, name: str) -> Exception:
    return errors.name_taken(name) if error.diag.constraint_name == "endpoints_name_key" else error


def _values(fields: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: arrays.texts(fields[name]) for name in ("events", "categories")}
    return {**fields, **lists}


async def _lock(connection: Connection, identity: uuid.UUID, version: int) -> dict[str, Any]:
    """The fields of an endpoint that nobody else changes until the transaction ends. Raises UNKNOWN_ENDPOINT,
    STALE_VERSION unless `version` is 0 or the current one.
    """
    row = await (await connection.execute(_LOCKED, {"id": identity})).fetchone()
    if row is None:
        raise errors.unknown_endpoint(str(identity))
    if version and version != row[0]:
        raise errors.stale_version(str(identity), version, row[0])
    return dict(zip(_FIELDS, row[1:], strict=True))


async def _after(connection: Connection, identity: uuid.UUID) -> Destination:
    found = await _read(connection, identity)
    if found is None:
        raise errors.unknown_endpoint(str(identity))
    return found


async def change(connection: Connection, identity: uuid.UUID, fields: Mapping[str, Any], version: int) -> Destination:
    """Changes fields. Raises UNKNOWN_ENDPOINT, STALE_VERSION, NAME_TAKEN."""
    try:
        async with connection.transaction():
            before = await _lock(connection, identity, version)
            await connection.execute(_UPDATE, {"id": identity, **_values({**before, **fields})})
            return await _after(connection, identity)
    except psycopg.errors.UniqueViolation as error:
        raise _name_taken(error, str(fields.get("name", ""))) from None


async def enable(connection: Connection, identity: uuid.UUID, version: int) -> Destination:
    """Switches an endpoint on. Raises UNKNOWN_ENDPOINT, STALE_VERSION."""
    async with connection.transaction():
        await _lock(connection, identity, version)
        await connection.execute(_ENABLE, {"id": identity})
        return await _after(connection, identity)


async def disable(connection: Connection, identity: uuid.UUID, reason: str, version: int) -> Destination:
    """Switches an endpoint off. Raises UNKNOWN_ENDPOINT, STALE_VERSION."""
    async with connection.transaction():
        await _lock(connection, identity, version)
        await connection.execute(_DISABLE, {"id": identity, "reason": reason})
        return await _after(connection, identity)


async def disable_gone(connection: Connection, identity: uuid.UUID, url: str, reason: str) -> bool:
    """Switches an endpoint off whose URL said that it is gone, if it still has that URL. Returns whether it did."""
    return (await connection.execute(_DISABLE_GONE, {"id": identity, "url": url, "reason": reason})).rowcount == 1


async def remove(connection: Connection, identity: uuid.UUID, version: int) -> None:
    """Deletes an endpoint; what is pending for it is due. Raises UNKNOWN_ENDPOINT, STALE_VERSION."""
    async with connection.transaction():
        await _lock(connection, identity, version)
        await connection.execute(_DELETE, {"id": identity})
        await connection.execute(_MAKE_DUE, {"target": target_of(identity)})


async def rotate(connection: Connection, identity: uuid.UUID, secret: str, overlap: float, version: int) -> Destination:
    """Adds a secret; the others expire after `overlap` seconds, or sooner if they were to. Raises UNKNOWN_ENDPOINT,
    STALE_VERSION, TOO_MANY_SECRETS.
    """
    async with connection.transaction():
        await _lock(connection, identity, version)
        if overlap:
            await connection.execute(_EXPIRE, {"id": identity, "overlap": overlap})
        else:
            await connection.execute(_DELETE_SECRETS, {"id": identity})
        await connection.execute(_INSERT_SECRET, {"id": identity, "secret": secret, "is_first": False})
        await connection.execute(_TOUCH, {"id": identity})
        after = await _after(connection, identity)
        if len(after.secrets) > MOST_SECRETS:
            raise errors.too_many_secrets(MOST_SECRETS)
        return after
