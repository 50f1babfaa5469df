"""Postgres: connections with the session settings of a long-running service, and SQLAlchemy Core compiled to SQL.

Core describes tables and builds statements; `sql` compiles a statement once, at import, and psycopg runs it. So
building costs nothing on the hot path and psycopg's own features (pipeline, notices, COPY, binary results) stay in
reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, conninfo
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from sqlalchemy.dialects.postgresql import psycopg as dialect
from sqlalchemy.sql import ClauseElement

from servicekit import logs, tasks, telemetry
from servicekit.arrays import Array, ArrayDumper

log = logs.get(__name__)

_T = TypeVar("_T")

Connection = AsyncConnection[TupleRow]
Pool = AsyncConnectionPool[Connection]

# What is raised when the database is away, or has ended the session. It passes; whether what was asked for was done is
# not known.
AWAY = (psycopg.OperationalError, psycopg.errors.IdleInTransactionSessionTimeout)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0

# libpq notices a peer that is gone within about 10 s, also while it waits for an answer.
KEEPALIVE = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "connect_timeout": 5,
}

_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call]
_NUMBERED_DIALECT = dialect.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


def sql(statement: ClauseElement) -> str:
    """The text of a Core statement with psycopg's named placeholders. Bind values at execution, by name."""
    return _compile(statement, _DIALECT)[0]


def numbered_sql(statement: ClauseElement) -> tuple[str, tuple[str, ...]]:
    """The text of a Core statement with Postgres' own placeholders ($1 ...), and the names of its parameters in
    order.
    """
    text, compiled = _compile(statement, _NUMBERED_DIALECT)
    return text, tuple(compiled.positiontup or ())


def _compile(statement: ClauseElement, for_dialect: Any) -> tuple[str, Any]:
    compiled: Any = statement.compile(dialect=for_dialect)
    literals = [name for name, value in compiled.params.items() if value is not None]
    if literals:
        raise ValueError(f"values are bound at execution, but the statement has literals: {sorted(literals)}")
    return str(compiled), compiled


def _conninfo(url: str, application: str, session: dict[str, str | int]) -> str:
    options = " ".join(f"-c {name}={value}" for name, value in session.items())
    return conninfo.make_conninfo(url, application_name=application, options=options, **KEEPALIVE)


def _adapt(connection: Connection) -> None:
    connection.prepare_threshold = 1
    connection.adapters.register_dumper(Array, ArrayDumper)


async def connect(url: str, application: str, **session: str | int) -> Connection:
    """A connection of one's own in autocommit mode; `session` are server settings of this connection."""
    connection = await AsyncConnection.connect(_conninfo(url, application, session), autocommit=True)
    _adapt(connection)
    return connection


def pool(url: str, application: str, *, size: int, **session: str | int) -> Pool:
    """A pool of at most `size` autocommit connections, not opened yet: `async with pool`. What a traced call asks has
    spans.
    """

    async def configure(connection: Connection) -> None:
        _adapt(connection)
        if telemetry.enabled():
            # Takes a tenth of a service's start, for nothing where spans are not exported.
            from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor

            PsycopgInstrumentor.instrument_connection(connection)

    kwargs: dict[str, Any] = {"autocommit": True}
    return AsyncConnectionPool(
        _conninfo(url, application, session),
        min_size=1,
        max_size=size,
        timeout=5.0,
        kwargs=kwargs,
        configure=configure,
        name=application,
        open=False,
    )


async def insist(action: Callable[[], Awaitable[_T]], away: str) -> _T:
    """Does something that needs the database, as often as it takes to reach it; each try is a heartbeat of its
    background loop. The log says `away` whenever it is not reached.
    """
    pause = _FIRST_PAUSE
    while True:
        tasks.beat()
        try:
            return await action()
        except AWAY as error:
            log.warning(away, error=str(error).strip(), retry_seconds=pause)
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


async def persist(pool: Pool, action: Callable[[Connection], Awaitable[_T]], away: str) -> _T:
    """Insists on something with a connection of a pool, which may be another at each try."""

    async def once() -> _T:
        async with pool.connection() as connection:
            return await action(connection)

    return await insist(once, away)
