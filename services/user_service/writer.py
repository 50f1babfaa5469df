"""The group commit: one writer per process turns waiting units into transactions of the feed.

A batch is one transaction in three steps: lock the feed's row, then read all that the batch must know; decide and
encode; write everything and COMMIT in one flush. Batches of all replicas run one after another, so every decision rests
on plain reads, and positions are dense and in commit order.

What always holds:
- Units that share a user, a name, an address or a request_id are never in one batch; the later one waits for the next.
- A unit's refusal is its own; the rest of the batch goes on. So is an item's, if its unit is independent.
- A caller is answered only when the outcome is known. After a lost connection `pg_xact_status` is asked, by the
  transaction's id noted before COMMIT, and the log, for an event of the batch; only a transaction known to be aborted
  is tried again, and only for callers that still wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import psycopg

from servicekit import database, flush, logs, tasks
from servicekit.database import Connection
from servicekit.errors import ServiceError
from user_service import errors, lanes, metrics, planning, reads, store, tracing
from user_service.domain import Unit
from user_service.events import Entry
from user_service.lanes import Outcome, Waiting
from user_service.queueing import Queue

log = logs.get(__name__)

APPLICATION = "tidings-users-writer"
_SESSION: dict[str, str | int] = {
    "synchronous_commit": "on",
    # A paused process must not hold the feed's lock: the server ends its session.
    "idle_in_transaction_session_timeout": "2s",
    "transaction_timeout": "10s",
}
_TRIES = 3
_QUEUED_WITHOUT_DATABASE = 5.0
_LONGEST_RECONNECT = 1.0


# How a transaction ends that nobody objected to: the connection broke, or the server ended a session that held the lock
# for too long (idle or transaction time-out), which psycopg has among the internal errors.
_LOST = (psycopg.OperationalError, psycopg.InternalError)


class _UnknownOutcomeError(Exception):
    """COMMIT was sent and no answer came, or the answer was not a plain success."""


class Writer:
    """Commits units. `submit` from any task; `run` is the one background loop."""

    def __init__(
        self,
        url: str,
        committed: Callable[[list[Entry]], None],
        in_doubt: Callable[[], None],
        *,
        batch_limit: int,
        linger: float,
        queue_limit: int,
        queue_limit_per_caller: int,
        deleted_kept: float,
        unknown_outcome_wait: float,
    ) -> None:
        self._url = url
        self._committed = committed
        self._in_doubt = in_doubt
        self._queue_limit = queue_limit
        self._queue_limit_per_caller = queue_limit_per_caller
        self._deleted_kept = timedelta(seconds=deleted_kept)
        self._unknown_outcome_wait = unknown_outcome_wait
        self._queue = Queue(batch_limit, linger)
        self._closed = False
        self._connection: Connection | None = None
        self._notices: list[str] = []
        self._batches = 0

    async def submit(self, unit: Unit) -> list[bytes]:
        """Returns the serialized answer for each item once the unit is committed. Raises the ServiceError it is
        refused with.
        """
        calls, more = self._queue.calls, len(unit.items)
        if calls.items + more > self._queue_limit:
            raise errors.queue_full()
        if unit.caller and calls.items_of[unit.caller] + more > self._queue_limit_per_caller:
            raise errors.caller_queue_full(unit.caller, self._queue_limit_per_caller)
        self._check_open()
        return cast("list[bytes]", await self._queue.add_call(unit))

    def submit_import(self, unit: Unit) -> asyncio.Future[list[Outcome]]:
        """Queues an independent unit of at most `import_limit` items; the future has each item's outcome, or the
        ServiceError that says why there is none.

        An import has one unit here at a time: so the lane is bounded by the number of imports, and of two users that
        want the same name the one that was sent first wins.
        """
        self._check_open()
        return self._queue.add_import(unit)

    def _check_open(self) -> None:
        if self._closed:
            raise errors.shutting_down()

    @property
    def import_limit(self) -> int:
        """How many items an import should ask for at once: fewer while calls are about."""
        return self._queue.imports.limit

    @property
    def waiting(self) -> dict[str, int]:
        """How many items wait, by lane."""
        return {lane.name: lane.items for lane in (self._queue.calls, self._queue.imports)}

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for a commit."""
        return self._queue.idle.is_set()

    async def close(self, timeout: float) -> None:
        """Refuses new units and waits until the queued ones are answered, at most `timeout` seconds."""
        self._closed = True
        try:
            async with asyncio.timeout(timeout):
                await self._queue.idle.wait()
        except TimeoutError:
            log.warning("changes were still waiting at the end", waiting=len(self._queue))

    async def run(self) -> None:
        """Commits batch after batch."""
        try:
            while True:
                with tasks.resting():
                    await self._queue.gather()
                calls = self._queue.take_calls()
                if calls:
                    await self._commit(calls)
                    self._queue.answered(calls)
                imports = self._queue.take_imports(beside_calls=bool(calls))
                if imports:
                    await self._commit(imports)
        finally:
            if self._connection is not None:
                await self._connection.close()

    # Committing it

    async def _commit(self, batch: list[Waiting]) -> None:
        for attempt in range(_TRIES):
            tasks.beat()
            batch = [waiting for waiting in batch if not waiting.outcomes.done()]
            if not batch:
                return
            connection = await self._connected(batch)
            if connection is None:
                return
            try:
                await self._transact(connection, batch)
            except _UnknownOutcomeError:
                self._in_doubt()
                _refuse(batch, errors.outcome_unknown())
                await self._disconnect()
                return
            except _LOST as error:
                # Known to be aborted: nothing of it is stored.
                log.warning("batch was aborted", attempt=attempt + 1, error=str(error).strip())
                await self._disconnect()
            except psycopg.Error as error:
                await self._disconnect()
                await self._narrow(batch, error)
                return
            except Exception as error:
                log.exception("batch failed")
                await self._disconnect()
                _refuse(batch, error)
                return
            else:
                return
        _refuse(batch, errors.database_unavailable())

    async def _narrow(self, batch: list[Waiting], error: psycopg.Error) -> None:
        """Finds what Postgres refused: tries the units of a batch alone, then the halves of an independent unit."""
        if len(batch) > 1:
            log.warning("batch was refused; trying its units one by one", error=str(error).strip())
            for waiting in batch:
                await self._commit([waiting])
            return
        [waiting] = batch
        unit = waiting.unit
        refusal = _refusal(error)
        if not unit.independent:
            _refuse(batch, refusal)
        elif len(unit.items) > 1:
            await self._commit_halves(waiting)
        elif isinstance(refusal, ServiceError):
            waiting.answer([refusal])
        else:
            _refuse(batch, refusal)

    async def _commit_halves(self, waiting: Waiting) -> None:
        unit = waiting.unit
        middle = len(unit.items) // 2
        outcomes: list[Outcome] = []
        for items in (unit.items[:middle], unit.items[middle:]):
            half = lanes.waiting(unit._replace(items=items), waiting.since)
            await self._commit([half])
            error = half.outcomes.exception()
            if error is not None:
                waiting.refuse(error)
                return
            outcomes += half.outcomes.result()
        waiting.answer(outcomes)

    async def _transact(self, connection: Connection, batch: list[Waiting]) -> None:
        """One transaction. Returns when it is committed; raises psycopg.Error only if it is known to be aborted."""
        self._batches += 1
        if self._batches.bit_count() == 1:
            # Tables grow faster than autovacuum looks at them: plan anew each time their growth may have doubled.
            await store.forget_plans(connection)
        waits = [waiting.wait for waiting in batch if waiting.wait is not None]
        lane = metrics.IMPORTS if batch[0].unit.independent else metrics.CALLS
        with tracing.committing(len(batch), waits) as commit, metrics.committing(lane) as measured:
            with commit.flush("lock and read"):
                locked, known = await store.begin(connection, planning.lookups(batch))
            plan = planning.plan(batch, locked, known, self._deleted_kept)
            if plan.entries or plan.kept:
                with commit.flush("write and commit"):
                    await self._write(connection, locked, plan)
                self._committed(plan.entries)
                tracing.sent(plan.sends)
                commit.ended(len(plan.entries), locked.head + len(plan.entries))
            else:
                await store.roll_back(connection)
                measured.outcome = "refused"
        for waiting, outcomes in plan.outcomes:
            waiting.answer(outcomes)

    async def _write(self, connection: Connection, locked: store.Locked, plan: planning.Plan) -> None:
        """Writes a plan and commits. Raises psycopg.Error only if that is known to be aborted."""
        self._notices.clear()
        try:
            await store.commit(connection, locked, plan.changes, plan.entries, plan.kept)
        except psycopg.Error:
            await self._disconnect()
            if not await self._is_committed(locked.xid, plan.entries):
                raise
        if any("synchronous replication" in notice for notice in self._notices):
            # Committed here, but perhaps not on the standby that will be the primary next.
            raise _UnknownOutcomeError

    async def _is_committed(self, xid: str, entries: list[Entry]) -> bool:
        """What became of a transaction whose COMMIT may have been sent. Raises _UnknownOutcomeError if it cannot be
        learnt.

        Its id alone is no proof: after a crash Postgres gives the id of a transaction that left no trace to another.
        The proof is an event that it wrote. (A transaction without any changed nobody; its retry is decided anew.)
        """
        deadline = time.monotonic() + self._unknown_outcome_wait
        while time.monotonic() < deadline:
            try:
                async with await database.connect(self._url, f"{APPLICATION}-outcome") as connection:
                    while time.monotonic() < deadline:
                        outcome = await store.outcome(connection, xid)
                        if outcome == "committed" and entries:
                            stored = await reads.event_id(connection, entries[-1].position)
                            outcome = outcome if stored == entries[-1].event_id else "aborted"
                        if outcome in ("committed", "aborted"):
                            log.warning("asked for the outcome of a commit", xid=xid, outcome=outcome)
                            return outcome == "committed"
                        if outcome is None:  # too old to tell
                            raise _UnknownOutcomeError
                        await asyncio.sleep(0.05)  # its session still runs
            except psycopg.OperationalError as error:
                log.warning("cannot ask for the outcome of a commit yet", xid=xid, error=str(error).strip())
                await asyncio.sleep(0.1)
        raise _UnknownOutcomeError

    # The connection

    async def _connected(self, batch: list[Waiting]) -> Connection | None:
        """The writer's connection, made anew if it was lost. None once no unit of the batch waits any longer."""
        delay = 0.05
        while self._connection is None or self._connection.closed:
            tasks.beat()
            try:
                connection = await database.connect(self._url, APPLICATION, **_SESSION)
                connection.add_notice_handler(self._note)
                await flush.prepare(connection, store.STATEMENTS)
                self._connection = connection
            except psycopg.OperationalError as error:
                log.warning("no connection for writing", error=str(error).strip(), retry_seconds=delay)
                self._expire(batch)
                if all(waiting.outcomes.done() for waiting in batch):
                    return None
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_RECONNECT)
        return self._connection

    def _expire(self, batch: list[Waiting]) -> None:
        """Refuses what has waited too long for a database."""
        since = asyncio.get_running_loop().time() - _QUEUED_WITHOUT_DATABASE
        late = [waiting for waiting in (*batch, *self._queue) if waiting.since < since]
        _refuse(late, errors.database_unavailable())

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _note(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        self._notices.append(diagnostic.message_primary or "")


def _refuse(batch: list[Waiting], error: BaseException) -> None:
    for waiting in batch:
        waiting.refuse(error)


def _refusal(error: psycopg.Error) -> BaseException:
    """What the caller of a unit learns that Postgres refused: the indexes are the safety net of the decisions."""
    constraint = error.diag.constraint_name or ""
    for field in ("username", "email"):
        if isinstance(error, psycopg.errors.UniqueViolation) and constraint.startswith(f"users_{field}"):
            return errors.name_taken(field, f"user.{field}", "the value")
    return error
