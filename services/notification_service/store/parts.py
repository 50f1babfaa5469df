"""What statements are built of: parameters, tables made of arrays, numbers that are written out.

Statements are built by SQLAlchemy Core, compiled at import, and run by psycopg once for many rows, with arrays. All
times are the database's: replicas need not agree on a clock.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ARRAY, DateTime, Uuid, bindparam, func, literal_column, or_
from sqlalchemy.sql.type_api import TypeEngine

TIME = DateTime(timezone=True)
UUID = Uuid(as_uuid=True)


def bind(name: str, kind: TypeEngine[Any]) -> Any:
    """A parameter of a type."""
    return bindparam(name, type_=kind)


def rows(**columns: TypeEngine[Any]) -> Any:
    """A table made of one array parameter per column."""
    parameters = [bind(name, ARRAY(kind)) for name, kind in columns.items()]
    return func.unnest(*parameters).table_valued(*columns).render_derived()


def number(value: int) -> Any:
    """A number that is written out: the planner knows it, and partial indexes match."""
    return literal_column(str(value))


def is_free(columns: Any) -> Any:
    """Whether nobody has a lease of a row of a table."""
    return or_(columns.lease_until.is_(None), columns.lease_until <= func.now())


SECOND: Any = literal_column("interval '1 second'")
MILLISECOND: Any = literal_column("interval '1 millisecond'")
