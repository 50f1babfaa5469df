"""The service's own copy of the users: against a real user service and Postgres."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from notification_service import metrics
from notification_service.compose import Composer
from notification_service.inbox import Inbox
from notification_service.recipients import Recipients, Source
from notification_service.store import audience, feed
from notification_service.store import recipients as store
from notification_service.store.recipients import HoldLostError
from servicekit.database import Connection, Pool
from tests.harness import Databases, ServiceProcess, Services
from tests.notifications.conftest import Events, batch, eventually
from tests.users.calls import create, stub_of
from tidings.client import Batch, CursorStore, UserFeed, connect
from tidings.users.v1 import users_pb2

Copy = dict[str, tuple[int, str | None]]


@pytest.fixture
async def users(databases: Databases, services: Services) -> ServiceProcess:
    return await services.users(await databases.users(), seal_interval=0.05, retention_interval=0.05).start()


@asynccontextmanager
async def keeping(pool: Pool, users: ServiceProcess, max_batch: int = 2) -> AsyncIterator[Recipients]:
    """A replica that keeps the copy, as the service does."""
    async with connect(users.address) as channel:

        def open_feed(cursor: CursorStore) -> AsyncGenerator[Batch, None]:
            return aiter(UserFeed(channel, cursor=cursor, start="snapshot", max_batch=max_batch, progress=True))

        async def log_id() -> uuid.UUID:
            return uuid.UUID((await stub_of(users).GetFeed(users_pb2.GetFeedRequest())).log_id)

        kept = Recipients(pool, Source(open_feed, log_id), lambda: None, lease=1.0)
        task = asyncio.create_task(kept.run())
        try:
            yield kept
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def copied(connection: Connection) -> Copy:
    """Version and email by username, or by id where it is deleted."""
    cursor = await connection.execute("SELECT user_id, version, username, email, delete_time FROM recipients")
    return {
        str(user_id) if gone else username: (version, email)
        for user_id, version, username, email, gone in await cursor.fetchall()
    }


def equals(connection: Connection, expected: Copy) -> Callable[[], object]:
    async def same() -> bool:
        return await copied(connection) == expected

    return same


async def test_the_copy_follows_and_keeps_no_personal_data_of_the_deleted(
    users: ServiceProcess, pool: Pool, connection: Connection
) -> None:
    stub = stub_of(users)
    ada = await stub.CreateUser(create(username="ada", email="ada@example.com", labels={"plan": "gold"}))
    bob = await stub.CreateUser(create(username="bob", email="bob@example.com"))
    async with keeping(pool, users):
        await eventually(equals(connection, {"ada": (1, "ada@example.com"), "bob": (1, "bob@example.com")}))
        await stub.UpdateUser(
            users_pb2.UpdateUserRequest(
                user=users_pb2.User(id=ada.id, email="new@example.com"), update_mask={"paths": ["email"]}
            )
        )
        await stub.DeleteUser(users_pb2.DeleteUserRequest(id=bob.id))
        await stub.CreateUser(create(username="eve", email="eve@example.com"))
        await eventually(
            equals(connection, {"ada": (2, "new@example.com"), bob.id: (2, None), "eve": (1, "eve@example.com")})
        )
        [gone] = await (
            await connection.execute(
                "SELECT username, email, display_name, locale, time_zone, labels, create_time FROM recipients"
                " WHERE delete_time IS NOT NULL"
            )
        ).fetchall()
        assert set(gone) == {None}
        await stub.UndeleteUser(users_pb2.UndeleteUserRequest(id=bob.id))
        await eventually(
            equals(
                connection,
                {"ada": (2, "new@example.com"), "bob": (3, "bob@example.com"), "eve": (1, "eve@example.com")},
            )
        )
    log_id, position, head = await store.place(connection)
    told = await stub.GetFeed(users_pb2.GetFeedRequest())
    assert (str(log_id), position, head) == (told.log_id, told.head_position, told.head_position)
    [person], gone_ids = await audience.of_ids(connection, [uuid.UUID(ada.id)])
    assert (person.email, person.labels, gone_ids) == ("new@example.com", {"plan": "gold"}, set())


async def test_an_expired_place_begins_anew_and_drops_whom_the_snapshot_does_not_name(
    databases: Databases, services: Services, pool: Pool, connection: Connection
) -> None:
    database = await databases.users()
    users = await services.users(
        database, events_kept=0.5, segment_events=1, unsealed_events=0, seal_interval=0.05, retention_interval=0.05
    ).start()
    stub = stub_of(users)
    made = [
        await stub.CreateUser(create(username=f"user{number}", email=f"u{number}@example.com")) for number in range(5)
    ]
    async with keeping(pool, users):
        await eventually(equals(connection, {f"user{number}": (1, f"u{number}@example.com") for number in range(5)}))
    # While nobody keeps the copy, users go and the place expires.
    await stub.DeleteUser(users_pb2.DeleteUserRequest(id=made[0].id))
    await database.fetch("DELETE FROM users WHERE id = %s", made[0].id)

    async def expired() -> bool:
        await stub.UpdateUser(
            users_pb2.UpdateUserRequest(
                user=users_pb2.User(id=made[1].id, display_name=str(uuid.uuid4())),
                update_mask={"paths": ["display_name"]},
            )
        )
        return (await stub.GetFeed(users_pb2.GetFeedRequest())).earliest_position > 7

    await eventually(expired)
    version = (await stub.GetUser(users_pb2.GetUserRequest(id=made[1].id))).version
    async with keeping(pool, users):
        await eventually(
            equals(
                connection,
                {
                    made[0].id: (1, None),
                    "user1": (version, "u1@example.com"),
                    **{f"user{number}": (1, f"u{number}@example.com") for number in (2, 3, 4)},
                },
            )
        )


async def test_of_another_log_versions_do_not_compare(
    databases: Databases, services: Services, pool: Pool, connection: Connection
) -> None:
    first, second = [await services.users(await databases.users()).start() for _ in range(2)]
    stub = stub_of(first)
    ada = await stub.CreateUser(create(username="ada", email="ada@example.com"))
    for number in range(3):
        await stub.UpdateUser(
            users_pb2.UpdateUserRequest(
                user=users_pb2.User(id=ada.id, display_name=str(number)), update_mask={"paths": ["display_name"]}
            )
        )
    await stub.CreateUser(create(username="bob", email="bob@example.com"))
    async with keeping(pool, first):
        await eventually(equals(connection, {"ada": (4, "ada@example.com"), "bob": (1, "bob@example.com")}))
    eve = await stub_of(second).CreateUser(create(username="eve", email="eve@example.com"))
    # The same user at a lower version, as after a restore.
    await connection.execute("UPDATE recipients SET user_id = %s WHERE username = 'ada'", (eve.id,))
    async with keeping(pool, second):

        async def is_the_second() -> bool:
            found = await copied(connection)
            return found.get("eve") == (1, "eve@example.com") and not {"ada", "bob"} & found.keys()

        await eventually(is_the_second)
        told = await stub_of(second).GetFeed(users_pb2.GetFeedRequest())
        log_id, position, _ = await store.place(connection)
        assert (str(log_id), position) == (told.log_id, 1)


async def test_one_replica_at_a_time_and_the_next_goes_on(
    users: ServiceProcess, pool: Pool, connection: Connection
) -> None:
    stub = stub_of(users)

    async def holder() -> tuple[object, ...] | None:
        return await (await connection.execute("SELECT owner, epoch FROM recipients_feed")).fetchone()

    async with keeping(pool, users) as first:
        await stub.CreateUser(create(username="ada", email="ada@example.com"))
        await eventually(equals(connection, {"ada": (1, "ada@example.com")}))
        held = await holder()
        assert held is not None
        async with keeping(pool, users):
            await stub.CreateUser(create(username="bob", email="bob@example.com"))
            await eventually(equals(connection, {"ada": (1, "ada@example.com"), "bob": (1, "bob@example.com")}))
            assert await holder() == held
            await first.drain()
            await stub.CreateUser(create(username="eve", email="eve@example.com"))

            async def the_other_has_it() -> bool:
                now = await holder()
                return now is not None and now[0] not in (None, held[0]) and "eve" in await copied(connection)

            await eventually(the_other_has_it)


async def test_a_connection_that_breaks_is_one_of_many(
    users: ServiceProcess, pool: Pool, connection: Connection
) -> None:
    stub = stub_of(users)
    async with keeping(pool, users):
        expected: Copy = {}
        for name in ("ada", "bob", "eve"):
            await stub.CreateUser(create(username=name, email=f"{name}@example.com"))
            expected[name] = (1, f"{name}@example.com")
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND usename = current_user AND pid != pg_backend_pid()"
            )
            await eventually(equals(connection, expected))


async def test_nothing_is_stored_twice_or_by_who_has_lost_it(connection: Connection, events: Events) -> None:
    held = await store.take(connection, uuid.uuid4(), 30.0)
    assert held is not None
    assert await store.take(connection, uuid.uuid4(), 30.0) is None
    moved = await store.store(connection, held, [], token="t1", lease=30.0, head_position=5, position=5)
    # From a place that is passed, and by an epoch that is over.
    for lost in (held, replace(moved, epoch=moved.epoch - 1), replace(moved, owner=uuid.uuid4())):
        with pytest.raises(HoldLostError):
            await store.store(connection, lost, [], token="t2", lease=30.0, head_position=6, position=6)
    assert (await store.place(connection))[1] == 5


async def test_older_versions_and_a_page_that_was_read_before_a_deletion_change_nothing(
    connection: Connection, composer: Composer, events: Events
) -> None:
    from notification_service.recipients import _named

    async def told(held: store.Held, token: str, one: users_pb2.UserEvent, part: str | None) -> store.Held:
        return await store.store(
            connection, held, _named(batch(one)), token=token, lease=30.0, head_position=9, position=9, part=part
        )

    ada = events.user("ada")
    old = events.created("x")
    old.user.CopyFrom(ada)
    changed = events.updated(ada, email="new@example.com")
    held = await store.take(connection, uuid.uuid4(), 30.0)
    assert held is not None
    held = await store.store(connection, held, [], token="b", lease=30.0, head_position=9, position=9, part="begin")
    held = await told(held, "1", changed, "within")
    assert await copied(connection) == {"ada": (2, "new@example.com")}
    held = await told(held, "2", old, "within")
    assert await copied(connection) == {"ada": (2, "new@example.com")}
    # The inbox hears of a deletion first; what the copy reads of it later is older.
    gone = events.deleted(changed.user)
    gone.user.version = 3
    await feed.read_cursor(connection)
    await Inbox(composer, lambda: None).store(connection, await feed.read_cursor(connection), batch(gone, after=0))
    assert await copied(connection) == {ada.id: (3, None)}
    held = await told(held, "3", changed, "within")
    assert await copied(connection) == {ada.id: (3, None)}
    # It was named, so the end of the snapshot leaves it alone; and who comes back has a higher version.
    assert await store.sweep(connection, held, store.NOBODY, 9) is None
    back = events.created("x")
    back.user.CopyFrom(changed.user)
    back.user.version = 4
    await told(held, "4", back, "end")
    assert await copied(connection) == {"ada": (4, "new@example.com")}


async def test_inside_of_a_snapshot_the_copy_is_as_of_where_it_was(connection: Connection) -> None:
    held = await store.take(connection, uuid.uuid4(), 30.0)
    assert held is not None

    async def move(token: str, position: int, part: str | None) -> tuple[int | None, bool]:
        nonlocal held
        assert held is not None
        held = await store.store(
            connection, held, [], token=token, lease=30.0, head_position=position, position=position, part=part
        )
        return held.position, held.inside

    assert await move("1", 10, "begin") == (None, True)
    assert await move("2", 10, None) == (None, True)  # a bookmark, which does not tell that it is inside
    assert await move("3", 10, "end") == (10, False)
    assert await move("4", 20, "begin") == (10, True)
    await store.leave(connection, held.owner)
    held = await store.take(connection, uuid.uuid4(), 30.0)
    assert held is not None
    assert held.inside
    assert await move("5", 20, None) == (10, True)
    assert await move("6", 20, "end") == (20, False)


async def test_how_long_it_is_silent_is_known_to_whoever_asks(connection: Connection) -> None:
    assert await store.silence(connection) is None
    standing = metrics.Copy()
    standing.found(None)
    assert list(metrics.RECIPIENTS_SILENCE.read()) == []
    held = await store.take(connection, uuid.uuid4(), 30.0)
    assert held is not None
    await connection.execute("UPDATE recipients_feed SET update_time = now() - interval '1 hour'")
    # To keep the lease is not to store anything.
    assert await store.renew(connection, held, 30.0)
    silence = await store.silence(connection)
    assert silence is not None
    assert silence >= 3600
    standing.found(silence)
    [(_, shown)] = metrics.RECIPIENTS_SILENCE.read()
    assert shown >= 3600
    # That there is no news is stored, too.
    await store.store(connection, held, [], token="1", lease=30.0, head_position=0, position=0)
    after = await store.silence(connection)
    assert after is not None
    assert after < 3600


async def test_what_cannot_be_stored_stays_in_hand_and_snapshots_tell_no_times(events: Events) -> None:
    ada = events.created("ada")
    ada.commit_time.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
    told = batch(ada, after=0)

    def lag() -> float | None:
        found = list(metrics.RECIPIENTS_LAG_TIME.read())
        return found[0][1] if found else None

    try:
        with metrics.copying(None, told, inside=True):
            assert lag() is None
        for _ in range(2):
            with pytest.raises(HoldLostError), metrics.copying(0, told, inside=False):
                raise HoldLostError
            assert (lag() or 0) >= 3600
        with metrics.copying(0, told, inside=False) as stored:
            stored(1)
        assert lag() == 0
        # The head is ahead and nothing comes: as old as what came last.
        with metrics.copying(1, replace(batch(after=1), head_position=5), inside=False) as stored:
            stored(1)
        assert (lag() or 0) >= 3600
    finally:
        metrics.recipients_left()
    assert lag() is None
