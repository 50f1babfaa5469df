"""A backlog that the statistics of the database know nothing of: no statement walks it for a few deliveries."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from notification_service.compose import Composer
from notification_service.domain import Ended, Result, State
from notification_service.gate import Defer, Reason
from notification_service.inbox import Inbox
from notification_service.store import feed, leases, outcomes, verdicts
from servicekit.database import Connection
from tests.notifications.conftest import Events, batch

_BACKLOG, _FEW = 3000, 10
_FILL = """
WITH made AS (
    INSERT INTO notifications
        (id, position, user_id, event_id, event_position, rule, category, template, channels, create_time)
    SELECT gen_random_uuid(), i, gen_random_uuid(), gen_random_uuid(), i, 'r', 'c', 't', '{email}', now()
    FROM generate_series(%(first)s::int, %(last)s::int) AS i RETURNING *
), sent AS (
    INSERT INTO deliveries (id, position, notification_id, user_id, event_id, channel, target, state, create_time,
        next_attempt_time, idempotency_key)
    SELECT gen_random_uuid(), position, id, user_id, event_id, 'email', position::text, %(state)s, now(),
        CASE WHEN %(state)s = 1 THEN now() END, id::text
    FROM made RETURNING id
)
INSERT INTO contents SELECT id, 'x' FROM sent
"""


@pytest.fixture
async def backlog(connection: Connection) -> Connection:
    """Much that was delivered before the statistics were made, and as much that is due since."""
    delivered = {"first": 1, "last": _BACKLOG, "state": State.DELIVERED.value}
    await connection.execute(_FILL, delivered)
    await connection.execute("VACUUM (ANALYZE)")
    await connection.execute(_FILL, {"first": 1 + _BACKLOG, "last": 2 * _BACKLOG, "state": State.PENDING.value})
    return connection


async def looked_at(connection: Connection) -> int:
    """How many rows of deliveries were found by way of an index, or by walking the table, so far."""
    await connection.execute("SELECT pg_stat_force_next_flush()")
    query = (
        "SELECT seq_tup_read + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'deliveries')"
        " FROM pg_stat_user_tables WHERE relname = 'deliveries'"
    )
    ((found,),) = await (await connection.execute(query)).fetchall()
    return int(found)


async def test_what_is_sent_costs_what_is_sent(backlog: Connection) -> None:
    before = await looked_at(backlog)
    picked, _ = await leases.pick(backlog, "email", _FEW, None, seconds=30.0, max_tries=8, busy=())
    begun = await leases.begin(backlog, [(one, "smtp") for one in picked], max_age=60.0)
    ended = [Ended(one.id, one.number, Result.SUCCEEDED, 250, "", State.DELIVERED, 0.0) for one in begun]
    assert len(await outcomes.record(backlog, ended)) == _FEW
    assert await looked_at(backlog) - before < _BACKLOG / 10


async def test_what_is_set_aside_costs_what_is_set_aside(backlog: Connection) -> None:
    before = await looked_at(backlog)
    picked, _ = await leases.pick(backlog, "email", _FEW, None, seconds=30.0, max_tries=8, busy=())
    later = Defer(datetime.now(UTC) + timedelta(hours=1), Reason.QUIET_HOURS, "")
    await verdicts.set_aside(backlog, [(one, later) for one in picked])
    assert await looked_at(backlog) - before < _BACKLOG / 10


async def test_a_deletion_costs_what_its_user_has(backlog: Connection, composer: Composer, events: Events) -> None:
    made = batch(*(events.deleted(events.user(f"user-{number}")) for number in range(_FEW)))
    await feed.read_cursor(backlog)
    await backlog.execute("UPDATE inbox SET (notification_position, delivery_position) = (%s, %s)", [2 * _BACKLOG] * 2)
    cursor = await feed.read_cursor(backlog)
    before = await looked_at(backlog)
    await Inbox(composer, lambda: None).store(backlog, cursor, made)
    assert await looked_at(backlog) - before < _BACKLOG / 10
