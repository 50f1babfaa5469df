"""What is no longer kept is removed, and nothing that is still needed: on a real Postgres."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from notification_service import retention
from notification_service.compose import Composer
from notification_service.domain import Person, SendState, State
from notification_service.inbox import Inbox
from notification_service.store import audience, feed, in_app, sends, standing
from notification_service.store import recipients as copy
from notification_service.store import retention as store
from notification_service.store.recipients import Deletion, Held, Named
from servicekit.database import Connection, Pool
from servicekit.errors import InvalidArgumentError
from tests.notifications.conftest import Events, batch, eventually
from tests.notifications.digesting import Site, renamed

KEPT = timedelta(days=30)
OLD, YOUNG = timedelta(days=31), timedelta(days=29)
LOG = uuid.UUID(int=7)


async def remove(pool: Pool) -> None:
    await retention.remove(pool, KEPT, KEPT)


async def ids(connection: Connection, table: str, key: str = "id") -> set[uuid.UUID]:
    return {one for (one,) in await (await connection.execute(f"SELECT {key} FROM {table}".encode())).fetchall()}


async def count(connection: Connection, *tables: str) -> list[int]:
    found = []
    for table in tables:
        row = await (await connection.execute(f"SELECT count(*) FROM {table}".encode())).fetchone()
        found.append(row[0] if row else -1)
    return found


async def notify(
    connection: Connection,
    *states: State,
    age: timedelta = OLD,
    send_id: uuid.UUID | None = None,
    user_id: uuid.UUID | None = None,
    number: int = 1,
) -> uuid.UUID:
    """Notifications in their user's in-app inbox, each with a delivery in each state. Returns the id of the last."""
    await feed.read_cursor(connection)
    cursor = await connection.execute(
        "WITH made AS (UPDATE inbox SET notification_position = notification_position + %(number)s,"
        " delivery_position = delivery_position + %(number)s::bigint * %(deliveries)s"
        " RETURNING notification_position, delivery_position),"
        " ids AS (SELECT gen_random_uuid() AS id, n FROM generate_series(1, %(number)s) AS n),"
        " notes AS (INSERT INTO notifications (id, position, user_id, event_id, event_position, rule, category,"
        " template, channels, create_time, send_id) SELECT id, notification_position - %(number)s + n,"
        " coalesce(%(user_id)s, id), id, 1, 'r', 'account', 't', '{in_app,email}', now() - %(age)s, %(send_id)s"
        " FROM made, ids RETURNING id, user_id, position),"
        " sent AS (INSERT INTO deliveries (id, position, notification_id, user_id, event_id, channel, target, state,"
        " create_time, idempotency_key) SELECT gen_random_uuid(), delivery_position"
        " - (notification_position - position + 1) * %(deliveries)s + d, notes.id, user_id, notes.id, 'email',"
        " d::text, state, now() - %(age)s, 'k' FROM made, notes, unnest(%(states)s::int[])"
        " WITH ORDINALITY AS s (state, d) RETURNING id),"
        " carried AS (INSERT INTO contents SELECT id, 'x' FROM sent),"
        " tried AS (INSERT INTO attempts (delivery_id, number, start_time) SELECT id, 1, now() FROM sent),"
        " decided AS (INSERT INTO delivery_decisions (delivery_id, kind, time) SELECT id, 1, now() FROM sent),"
        " operated AS (INSERT INTO delivery_operations (delivery_id, kind, actor, reason, time)"
        " SELECT id, 1, 'ada', 'because', now() FROM sent)"
        " SELECT id FROM notes ORDER BY position DESC LIMIT 1",
        {
            "number": number,
            "deliveries": len(states),
            "states": [int(state) for state in states],
            "age": age,
            "send_id": send_id,
            "user_id": user_id,
        },
    )
    row = await cursor.fetchone()
    assert row is not None
    return uuid.UUID(str(row[0]))


async def test_a_notification_goes_with_all_that_became_of_it(pool: Pool, connection: Connection) -> None:
    over = [
        await notify(connection),
        await notify(connection, State.DELIVERED),
        await notify(connection, State.DELIVERED, State.CANCELLED, State.DISCARDED),
    ]
    kept = {
        await notify(connection, State.DELIVERED, State.PENDING),
        await notify(connection, State.PARKED, State.CANCELLED),
        await notify(connection, State.DELIVERED, age=YOUNG),
        await notify(connection, State.CANCELLED, age=YOUNG),
    }
    before = await standing.inbox_state(connection)
    assert (before.notifications, before.delivered, before.discarded, before.cancelled) == (7, 4, 1, 3)
    await remove(pool)
    assert await ids(connection, "notifications") == kept
    tables = ("deliveries", "contents", "attempts", "delivery_decisions", "delivery_operations")
    assert await count(connection, *tables) == [6] * 5
    # Those that were delivered are counted for good, and no others with them.
    after = await standing.inbox_state(connection)
    assert (after.notifications, after.delivered, after.discarded, after.cancelled) == (7, 4, 0, 2)
    assert (after.pending, after.parked) == (1, 1)
    # What is done with goes in the next round.
    await connection.execute("UPDATE deliveries SET state = 4 WHERE state IN (1, 3)")
    await remove(pool)
    assert len(await ids(connection, "notifications")) == 2
    assert over[0] not in await ids(connection, "notifications")
    assert (await standing.inbox_state(connection)).delivered == 4


async def test_what_stays_does_not_hide_what_is_over_behind_it(pool: Pool, connection: Connection) -> None:
    await notify(connection, State.PARKED, number=store.CHUNK + 20)
    await notify(connection, State.DELIVERED, number=2 * store.CHUNK + 20)
    young = await notify(connection, State.DELIVERED, age=YOUNG)
    await remove(pool)
    left = await (await connection.execute("SELECT state, count(*) FROM deliveries GROUP BY state")).fetchall()
    assert dict(left) == {State.PARKED: store.CHUNK + 20, State.DELIVERED: 1}
    assert young in await ids(connection, "notifications")


async def test_an_open_inbox_hears_that_its_counts_are_others(pool: Pool, connection: Connection) -> None:
    ada, bob = uuid.uuid4(), uuid.uuid4()
    await notify(connection, user_id=ada, number=3)
    await notify(connection, user_id=ada, age=YOUNG)
    await notify(connection, user_id=bob)
    stranger = await notify(connection)
    for one in (ada, bob):
        await connection.execute("INSERT INTO recipients (user_id, version) VALUES (%s, 1)", [one])
    await connection.execute("UPDATE notifications SET archive_time = now() WHERE user_id = %s", [bob])
    before = await in_app.counts(connection, ada)
    assert before.counts.unseen == 4
    await remove(pool)
    after = await in_app.counts(connection, ada)
    assert (after.counts.unseen, after.version) == (1, before.version + 1)
    # What was put away is in no count, and who is gone looks at none.
    assert stranger not in await ids(connection, "notifications")
    assert await ids(connection, "in_app_changes", "user_id") == {ada}


async def test_replicas_do_it_at_once_and_wait_for_nobody(pool: Pool, connection: Connection) -> None:
    ada = uuid.uuid4()
    busy = await notify(connection, State.DELIVERED)
    await notify(connection, State.DELIVERED, State.CANCELLED, user_id=ada, number=2 * store.CHUNK)
    async with pool.connection() as other, other.transaction():
        await other.execute("SELECT FROM notifications WHERE id = %s FOR UPDATE", [busy])
        async with asyncio.timeout(60):
            await asyncio.gather(*(remove(pool) for _ in range(3)))
        assert await ids(connection, "notifications") == {busy}
    await remove(pool)
    assert await count(connection, "notifications", "deliveries") == [0, 0]
    # Nothing is counted twice.
    assert (await standing.inbox_state(connection)).delivered == 2 * store.CHUNK + 1


def new_send(request_id: uuid.UUID, what: bytes = b"what") -> sends.New:
    return sends.New(
        uuid.uuid4(), "news", "news", ("email",), {}, (), None, None, "shop", request_id, what, "", ""
    )  # fmt: skip


async def made(connection: Connection, state: SendState, *, age: timedelta = OLD, settled: bool = True) -> uuid.UUID:
    found, is_new = await sends.create(connection, new_send(uuid.uuid4()), None, 0)
    assert is_new
    await connection.execute(
        "UPDATE sends SET state = %s, settled = %s, create_time = now() - %s,"
        " end_time = CASE WHEN %s IN (3, 4, 5) THEN now() - %s END WHERE id = %s",
        [state, settled, OLD, state, age, found.id],
    )
    return uuid.UUID(found.id)


async def test_a_send_that_is_over_goes_once_nothing_of_it_is_left(pool: Pool, connection: Connection) -> None:
    for state in (SendState.SENT, SendState.FAILED, SendState.CANCELLED):
        await made(connection, state)
    kept = {
        await made(connection, SendState.SCHEDULED),
        await made(connection, SendState.SENDING),
        await made(connection, SendState.CANCELLED, settled=False),
        await made(connection, SendState.SENT, age=YOUNG),
    }
    pending, young = await made(connection, SendState.SENT), await made(connection, SendState.SENT)
    await notify(connection, State.DELIVERED, State.PENDING, send_id=pending)
    await notify(connection, State.DELIVERED, age=YOUNG, send_id=young)
    done = await made(connection, SendState.SENT)
    await notify(connection, State.DELIVERED, State.CANCELLED, send_id=done)
    await remove(pool)
    assert await ids(connection, "sends") == {*kept, pending, young}
    await connection.execute("UPDATE deliveries SET state = 2")
    await remove(pool)
    assert await ids(connection, "sends") == {*kept, young}


async def test_a_request_id_answers_for_as_long_as_its_send_is_kept(pool: Pool, connection: Connection) -> None:
    asked = uuid.uuid4()
    first, _ = await sends.create(connection, new_send(asked), None, 0)
    await connection.execute(
        "UPDATE sends SET state = 3, create_time = now() - %s, end_time = now() - %s", [OLD, YOUNG]
    )
    await remove(pool)
    again, is_new = await sends.create(connection, new_send(asked), None, 0)
    assert (again.id, is_new) == (first.id, False)
    with pytest.raises(InvalidArgumentError, match="request_id"):
        await sends.create(connection, new_send(asked, b"other"), None, 0)
    await connection.execute("UPDATE sends SET end_time = now() - %s", [OLD])
    await remove(pool)
    anew, is_new = await sends.create(connection, new_send(asked, b"other"), None, 0)
    assert is_new
    assert anew.id != first.id


async def test_a_digest_goes_after_what_it_gathered_and_its_mail(site: Site, events: Events) -> None:
    ada, bob = events.user("ada"), events.user("bob")
    await site.store(renamed(events, ada, "A"), renamed(events, ada, "B"), renamed(events, bob, "C"))
    of_bob, of_ada = await site.digests()
    await site.digester().flush(uuid.UUID(of_ada.id))
    connection = site.connection
    await connection.execute("UPDATE notifications SET create_time = now() - %s", [OLD])
    await connection.execute("UPDATE digests SET open_time = now() - %s", [OLD])
    # The mail of Ada's is not out yet, and Bob's is open.
    await remove(site.pool)
    assert await count(connection, "notifications", "digests", "digest_items") == [2, 2, 3]
    await connection.execute("UPDATE deliveries SET state = 2")
    await remove(site.pool)
    assert await count(connection, "notifications", "digests", "digest_items") == [1, 2, 3]
    await connection.execute("UPDATE digests SET end_time = now() - %s WHERE end_time IS NOT NULL", [OLD])
    await remove(site.pool)
    assert [one.id for one in await site.digests()] == [of_bob.id]
    assert await count(connection, "notifications", "digest_items") == [1, 1]
    # Bob's is closed late, and has what it gathered.
    await site.digester().flush(uuid.UUID(of_bob.id))
    [mail] = (await site.mails()).values()
    assert "C|" in str(mail)
    await connection.execute("UPDATE digests SET end_time = now() - %s", [OLD])
    await remove(site.pool)
    # Its mail is young.
    assert await count(connection, "notifications", "digests") == [1, 1]
    await connection.execute("UPDATE notifications SET create_time = now() - %s", [OLD])
    await connection.execute("UPDATE deliveries SET state = 2")
    await remove(site.pool)
    assert await count(connection, "notifications", "digests", "digest_items") == [0, 0, 0]


async def test_a_digest_stays_beside_an_item_that_is_kept(site: Site, events: Events) -> None:
    ada = events.user("ada")
    # In two digests: of the old address and of the new one. It names the first.
    await site.store(events.updated(ada, email="new@example.com"))
    connection = site.connection
    await site.close_all()
    await connection.execute("UPDATE digests SET end_time = now() - %s", [OLD])
    await connection.execute("UPDATE deliveries SET state = 2")
    await connection.execute("UPDATE notifications SET create_time = now() - %s WHERE rule LIKE 'digest:%%'", [OLD])
    await remove(site.pool)
    assert await count(connection, "notifications", "digests", "digest_items") == [1, 2, 2]
    await connection.execute("UPDATE notifications SET create_time = now() - %s", [OLD])
    await remove(site.pool)
    assert await count(connection, "notifications", "digests", "digest_items") == [0, 0, 0]


@pytest.fixture
async def held(connection: Connection) -> Held:
    """The copy of the users is whole as of position 10, and so is the inbox, of the same log."""
    await feed.read_cursor(connection)
    await connection.execute("UPDATE inbox SET log_id = %s, position = 10, resume_token = 't'", [LOG])
    taken = await copy.take(connection, uuid.uuid4(), 600.0)
    assert taken is not None
    begun = await copied(connection, taken, 10, part="begin")
    return await copied(connection, begun, 10, part="end")


async def copied(connection: Connection, held: Held, position: int, *named: Named, **more: Any) -> Held:
    """The copy, moved to a position; the newest is 10 at least."""
    given = {"token": str(uuid.uuid4()), "lease": 600.0, "head_position": max(position, 10), "log_id": LOG, **more}
    return await copy.store(connection, held, named, position=position, **given)


async def bury(connection: Connection, position: int, age: timedelta = OLD) -> uuid.UUID:
    """A user who was deleted so long ago."""
    user_id = uuid.uuid4()
    await copy.bury(connection, {user_id: Deletion(position, 2)})
    await connection.execute("UPDATE recipients SET delete_time = now() - %s WHERE user_id = %s", [age, user_id])
    return user_id


async def test_a_mark_of_a_deleted_user_goes_once_both_are_past_it(
    pool: Pool, connection: Connection, held: Held
) -> None:
    await bury(connection, 10)
    young, ahead = await bury(connection, 10, YOUNG), await bury(connection, 11)
    alive = Person(uuid.uuid4(), 1, "ada", "ada@example.com", "Ada", "", "", {}, None, None)
    held = await copied(connection, held, 10, Named(alive.user_id, 1, alive))
    await remove(pool)
    assert await ids(connection, "recipients", "user_id") == {young, ahead, alive.user_id}
    # Of the two one is past it, which is not enough.
    held = await copied(connection, held, 11)
    await remove(pool)
    assert ahead in await ids(connection, "recipients", "user_id")
    for one in (ahead, young):
        await connection.execute("INSERT INTO in_app_changes VALUES (%s, 3)", [one])
    await connection.execute("UPDATE inbox SET position = 11")
    await remove(pool)
    assert await ids(connection, "recipients", "user_id") == {young, alive.user_id}
    assert await ids(connection, "in_app_changes", "user_id") == {young}


_SHARDS = f"INSERT INTO shards (shard, of, log_id, position) VALUES (0, 2, '{LOG}', 10), (1, 2, NULL, 9)"


@pytest.mark.parametrize(
    "behind",
    [
        "UPDATE inbox SET position = 9",
        f"UPDATE inbox SET resume_token = 'divided'; {_SHARDS}",
        "UPDATE recipients_feed SET position = 9",
        "UPDATE recipients_feed SET position = NULL",
        "UPDATE recipients_feed SET inside = true",
        "UPDATE recipients_feed SET resume_token = NULL",
        "UPDATE inbox SET log_id = gen_random_uuid()",
        "DELETE FROM recipients_feed",
    ],
)
async def test_while_one_is_behind_or_begins_anew_the_marks_stay(
    pool: Pool, connection: Connection, held: Held, behind: str
) -> None:
    await bury(connection, 10)
    # Of a release that noted no positions.
    await bury(connection, 10)
    await connection.execute(
        "UPDATE recipients SET delete_position = NULL WHERE user_id = (SELECT user_id FROM recipients LIMIT 1)"
    )
    for statement in behind.split(";"):
        await connection.execute(statement.encode())
    await remove(pool)
    assert await count(connection, "recipients") == [2]


async def test_marks_without_a_position_and_of_a_log_that_was_replaced_go_too(
    pool: Pool, connection: Connection, held: Held
) -> None:
    await bury(connection, 10)
    await connection.execute("UPDATE recipients SET delete_position = NULL")
    await remove(pool)
    assert await count(connection, "recipients") == [0]
    await bury(connection, 5000)
    held = await copy.forget_place(connection, held, other_history=True)
    await remove(pool)
    assert await count(connection, "recipients") == [1]
    held = await copied(connection, held, 3, part="begin", log_id=uuid.uuid4())
    await remove(pool)
    assert await count(connection, "recipients") == [1]
    await copied(connection, held, 3, part="end", log_id=uuid.uuid4())
    await remove(pool)
    assert await count(connection, "recipients") == [0]


async def test_a_late_event_does_not_bring_back_a_deleted_user(
    pool: Pool, connection: Connection, held: Held, composer: Composer, events: Events
) -> None:
    ada = events.user("ada")
    gone = events.deleted(ada)
    gone.position, gone.user.version = 12, 3
    at = replace(await feed.read_cursor(connection), log_id=LOG)
    await Inbox(composer, lambda: None).store(connection, at, batch(gone, after=at.position))
    await connection.execute("UPDATE recipients SET delete_time = now() - %s", [OLD])
    await remove(pool)
    # The copy comes to what was before it only now.
    late = Person(uuid.UUID(ada.id), 2, "ada", "ada@example.com", "Ada", "", "", {}, None, None)
    held = await copied(connection, held, 11, Named(late.user_id, 2, late))
    assert await audience.living(connection, [late.user_id]) == set()
    await copied(connection, held, 12)
    await remove(pool)
    assert await count(connection, "recipients") == [0]


async def test_what_the_copy_and_its_sweep_mark_has_its_position(connection: Connection, held: Held) -> None:
    gone, left = uuid.uuid4(), uuid.uuid4()
    held = await copied(connection, held, 11, Named(gone, 2, None, delete_time=datetime.now(UTC)))
    someone = Person(left, 1, "ada", "ada@example.com", "Ada", "", "", {}, None, None)
    held = await copied(connection, held, 12, Named(left, 1, someone))
    held = await copied(connection, held, 13, part="begin")
    await copy.sweep(connection, held, copy.NOBODY, 13)
    rows = await connection.execute("SELECT user_id, delete_position FROM recipients WHERE delete_time IS NOT NULL")
    assert dict(await rows.fetchall()) == {gone: 11, left: 13}
    # Who comes back is no longer of a deletion.
    held = await copied(connection, held, 13, Named(gone, 3, replace(someone, user_id=gone)), part="within")
    rows = await connection.execute("SELECT delete_position FROM recipients WHERE user_id = %s", [gone])
    assert await rows.fetchall() == [(None,)]


async def test_statements_go_by_their_index(connection: Connection, held: Held) -> None:
    await notify(connection, State.DELIVERED, State.DELIVERED, number=8000)
    await connection.execute(
        "INSERT INTO recipients (user_id, version, delete_time) SELECT gen_random_uuid(), 1,"
        " CASE WHEN n % 100 = 0 THEN now() END FROM generate_series(1, 20000) AS n"
    )
    await connection.execute(
        "INSERT INTO sends (id, template, category, channels, params, send_time, request_id, request_hash, create_time,"
        " end_time, state) SELECT gen_random_uuid(), 't', 'c', '{}', '{}', now(), gen_random_uuid(), '', now(), now(),"
        " 3 FROM generate_series(1, 5000)"
    )
    await connection.execute(
        "INSERT INTO digests (id, user_id, name, target, category, template, items, open_time, close_time, end_time,"
        " event_id, event_position, state) SELECT gen_random_uuid(), gen_random_uuid(), 'n', 't', 'c', 't', 1, now(),"
        " now(), now(), gen_random_uuid(), 1, 2 FROM generate_series(1, 5000)"
    )
    await connection.execute("INSERT INTO digest_items SELECT id, 1, gen_random_uuid(), '{}' FROM digests")
    await connection.execute("VACUUM ANALYZE")
    # To read a whole table is as dear as if it were a hundred times as large; where there is no other way it is done.
    await connection.execute("SET seq_page_cost = 100")
    for statement, index in (
        (store._REMOVE_NOTIFICATIONS, "notifications_position_key"),
        (store._REMOVE_NOTIFICATIONS, "deliveries_notification_id_channel_target_key"),
        (store._REMOVE_SENDS, "sends_ended_idx"),
        (store._REMOVE_DIGESTS, "digests_ended_idx"),
        (store._REMOVE_TOMBSTONES, "recipients_deleted_idx"),
    ):
        values = {"kept": KEPT, "after": 0}
        rows = await (await connection.execute(f"EXPLAIN {statement}", values)).fetchall()
        plan = "\n".join(str(row[0]) for row in rows)
        assert index in plan, plan
        for table in ("notifications", "deliveries", "sends", "digests", "digest_items", "recipients"):
            assert not re.search(rf"Seq Scan on {table}\b", plan), plan


async def test_the_loop_outlives_a_database_that_is_away(
    pool: Pool, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "INTERVAL", 0.05)
    loop = asyncio.create_task(retention.run(pool, KEPT.total_seconds(), KEPT.total_seconds()))
    try:
        for _ in range(2):
            await notify(connection, State.DELIVERED)
            await eventually(lambda: _is_empty(connection))
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()"
            )
        assert not loop.done()
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


async def _is_empty(connection: Connection) -> bool:
    return await count(connection, "notifications") == [0]
