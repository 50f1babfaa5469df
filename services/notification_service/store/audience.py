"""The SQL that reads this service's own copy of the users: who lives, and whom a filter matches."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import ARRAY, Integer, Text, any_, cast, func, literal_column, or_, select, true
from sqlalchemy.dialects.postgresql import JSONB

from notification_service.domain import Person
from notification_service.store.parts import UUID, bind, number
from notification_service.tables import recipients
from servicekit import arrays
from servicekit.database import Connection, sql

# How many rows a page of a filter looks at.
_LOOKED_AT = 2000

_row = recipients.c
# In the order of a Person's fields.
_PERSON = tuple(_row[one.name] for one in fields(Person))
_OF_IDS = sql(
    select(*_PERSON, _row.delete_time).where(_row.user_id == any_(bind("ids", ARRAY(UUID)))).order_by(_row.user_id)
)
_LIVING = sql(select(_row.user_id).where(_row.user_id == any_(bind("ids", ARRAY(UUID))), _row.delete_time.is_(None)))


def _matches(table: Any) -> Any:
    """Whether a user lives and is one that a filter, by its parameters, asks for; one that is null asks nothing."""
    locale = func.lower(bind("locale", Text()))
    given: list[tuple[str, Any]] = [
        ("labels", table.labels.contains(cast(bind("labels", Text()), JSONB))),
        ("username_prefix", func.starts_with(table.username, bind("username_prefix", Text()))),
        ("email_prefix", func.starts_with(func.lower(table.email), func.lower(bind("email_prefix", Text())))),
        (
            "locale",
            or_(
                func.lower(table.locale) == locale,
                func.starts_with(func.lower(table.locale), func.concat(locale, literal_column("'-'"))),
            ),
        ),
    ]
    conditions = [or_(bind(name, Text()).is_(None), condition) for name, condition in given]
    return (table.delete_time.is_(None), *conditions)


# Looks at a bounded number of rows, however few of them match.
_window = (
    select(recipients)
    .where(_row.user_id > bind("after", UUID))
    .order_by(_row.user_id)
    .limit(number(_LOOKED_AT))
    .cte("looked_at")
)
_found = (
    select(*(_window.c[column.name] for column in _PERSON))
    .where(*_matches(_window.c))
    .order_by(_window.c.user_id)
    .limit(bind("most", Integer()))
    .cte("found")
)
_end = select(
    # There is no max of uuids.
    select(_window.c.user_id).order_by(_window.c.user_id.desc()).limit(number(1)).scalar_subquery().label("last"),
    select(func.count()).select_from(_window).scalar_subquery().label("looked"),
).cte("the_end")
_PAGE = sql(
    select(_end.c.last, _end.c.looked, *_found.c).outerjoin_from(_end, _found, true()).order_by(_found.c.user_id)
)
_COUNT = sql(select(func.count()).select_from(recipients).where(*_matches(_row)))
_MATCHES = sql(select(_row.user_id).where(_row.user_id == bind("user_id", UUID), *_matches(_row)))


@dataclass(frozen=True, slots=True)
class Page:
    """Users that a filter matches, in the order of their ids. The next page begins after `upto`; None is the end."""

    people: list[Person]
    upto: uuid.UUID | None


async def of_ids(connection: Connection, ids: Sequence[uuid.UUID]) -> tuple[list[Person], set[uuid.UUID]]:
    """The living users among these, in the order of their ids, and which of these are deleted."""
    found = await (await connection.execute(_OF_IDS, {"ids": arrays.uuids(ids)}, binary=True)).fetchall()
    living = [Person(*person) for *person, delete_time in found if delete_time is None]
    return living, {person[0] for *person, delete_time in found if delete_time is not None}


async def living(connection: Connection, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Which of these are known and not deleted."""
    return {one for (one,) in await (await connection.execute(_LIVING, {"ids": arrays.uuids(ids)})).fetchall()}


async def page(connection: Connection, conditions: Mapping[str, Any], after: uuid.UUID, most: int) -> Page:
    """At most so many users after one that a filter, as stored, matches. A page may have none and not be the last."""
    values = {**_conditions(conditions), "after": after, "most": most}
    found = await (await connection.execute(_PAGE, values, binary=True)).fetchall()
    last, looked = found[0][:2]
    people = [Person(*row[2:]) for row in found if row[2] is not None]
    if len(people) == most:
        return Page(people, people[-1].user_id)
    return Page(people, last if looked == _LOOKED_AT else None)


def _conditions(given: Mapping[str, Any]) -> dict[str, str | None]:
    labels = given.get("labels")
    names = ("username_prefix", "email_prefix", "locale")
    return {"labels": json.dumps(labels) if labels else None, **{name: given.get(name) or None for name in names}}


async def count(connection: Connection, conditions: Mapping[str, Any]) -> int:
    """How many living users a filter matches now."""
    row = await (await connection.execute(_COUNT, _conditions(conditions))).fetchone()
    return int(row[0]) if row else 0


async def does_match(connection: Connection, conditions: Mapping[str, Any], user_id: uuid.UUID) -> bool:
    """Whether a filter, as stored, matches a user now."""
    values = {**_conditions(conditions), "user_id": user_id}
    return await (await connection.execute(_MATCHES, values)).fetchone() is not None
