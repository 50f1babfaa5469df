"""Several prepared statements in one flush to Postgres: one write, one wait, and no cancellation.

psycopg's own pipeline writes each statement as it comes. That lets a session be caught between two statements of a
transaction that were meant to arrive together, where no idle time-out of the server applies, and it costs a turn of the
event loop for each. Here everything up to the synchronization point is in libpq's buffer before the first byte is sent.
It stands on `psycopg.pq`, psycopg's documented access to libpq; see libpq's "Pipeline Mode".

A connection used here is in pipeline mode for good: nothing else may be run on it. A flush that is interrupted closes
it, and no cancellation is ever sent to the server: what was sent may be a COMMIT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.rows import TupleRow
from sqlalchemy.sql import ClauseElement

from servicekit import database
from servicekit.arrays import Array
from servicekit.database import Connection

_DONE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement to prepare, with its parameters in their order."""

    name: bytes
    text: bytes
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A prepared statement with the values of its parameters: Arrays, or anything whose text Postgres understands."""

    statement: Statement
    values: Mapping[str, Any]


def statement(name: str, element: ClauseElement | str) -> Statement:
    """A Core statement, or plain SQL without parameters, under a name."""
    if isinstance(element, str):
        return Statement(name.encode(), element.encode(), ())
    text, parameters = database.numbered_sql(element)
    return Statement(name.encode(), text.encode(), parameters)


async def prepare(connection: Connection, statements: Sequence[Statement]) -> None:
    """Puts a connection into pipeline mode and prepares statements on it."""
    pgconn = connection.pgconn
    pgconn.enter_pipeline_mode()
    for one in statements:
        pgconn.send_prepare(one.name, one.text)
    await _results(connection, len(statements))


async def run(connection: Connection, calls: Sequence[Call]) -> list[list[TupleRow]]:
    """The rows of each call. Raises the first error; the calls after it were not run."""
    pgconn = connection.pgconn
    for call in calls:
        encoded = [_encode(call.values[name]) for name in call.statement.parameters]
        pgconn.send_query_prepared(
            call.statement.name,
            [data for data, _ in encoded],
            param_formats=[kind for _, kind in encoded],
            result_format=pq.Format.BINARY,
        )
    results = await _results(connection, len(calls))
    transformer = Transformer.from_context(connection)
    rows = []
    for result in results:
        if result.ntuples:
            # Looks up how each column is read, which takes longer than a row.
            transformer.set_pgresult(result)
            rows.append(transformer.load_rows(0, result.ntuples, tuple))
        else:
            rows.append([])
    return rows


def _encode(value: object) -> tuple[bytes, pq.Format]:
    if isinstance(value, Array):
        return value.data, pq.Format.BINARY
    return str(value).encode(), pq.Format.TEXT


async def _results(connection: Connection, count: int) -> list[pq.abc.PGresult]:
    """Sends what is buffered and a synchronization point, and reads `count` results and the point."""
    pgconn = connection.pgconn
    try:
        pgconn.pipeline_sync()
        while pgconn.flush():
            # The server may be unable to read before it has been read from.
            await _ready(pgconn.socket, writable=True)
            pgconn.consume_input()
        results: list[pq.abc.PGresult] = []
        failed: psycopg.Error | None = None
        while True:
            while pgconn.is_busy():
                await _ready(pgconn.socket, writable=False)
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:  # the end of one statement's results
                if pgconn.status == pq.ConnStatus.BAD:
                    raise psycopg.OperationalError("the connection is lost")
                continue
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                break
            if result.status in _DONE:
                results.append(result)
            elif failed is None and result.status != pq.ExecStatus.PIPELINE_ABORTED:
                failed = error_from_result(result)
                if pgconn.status == pq.ConnStatus.BAD:
                    raise failed
    except BaseException:
        pgconn.finish()
        raise
    if failed is not None:
        raise failed
    if len(results) != count:
        raise psycopg.OperationalError(f"{len(results)} results where {count} were asked for")
    return results


async def _ready(socket: int, *, writable: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(socket, wake)
    if writable:
        loop.add_writer(socket, wake)
    try:
        await ready
    finally:
        loop.remove_reader(socket)
        if writable:
            loop.remove_writer(socket)
