"""Health of real services, while what they need is taken away and given back."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import grpc.aio
import pytest

from tests.harness import (
    Action,
    Database,
    Databases,
    PostgresProxy,
    ServiceProcess,
    Services,
    sql_contains,
    until,
)
from tests.migrations.commands import migrate
from tests.servicekit.probes import check, statuses, watching
from tests.users.calls import create, refusal, stub_of

_USERS, _NOTIFICATIONS = "tidings.users.v1.UserService", "tidings.notifications.v1.NotificationService"
_NOBODY = "127.0.0.1:1"
# Loops go round ten times a second, and are missed soon.
_IMPATIENT = {"poll_interval": 0.1, "overdue_after": 1}


async def _listening(service: ServiceProcess) -> str:
    await service.launch()
    service.address = str((await service.wait_log("listening"))["address"])
    return service.address


async def _reason(address: str, name: str = "readiness") -> str:
    return (await check(address, name))[1].get("tidings-reason", "")


async def _until_reason(service: ServiceProcess, *words: str, name: str = "readiness") -> None:
    """Waits until the reason has some of these words."""

    async def said() -> bool:
        reason = await _reason(service.address, name)
        return any(one in reason for one in words)

    await until(said, 60, f"{name}: {words}")


async def test_it_answers_while_it_waits_for_the_schema(databases: Databases, services: Services) -> None:
    made = await databases.blank("users")
    service = services.users(made)
    address = await _listening(service)
    dead = dict.fromkeys(("startup", "balancing", "readiness", "", _USERS), False)
    await _until_reason(service, "waiting for the schema")
    assert await statuses(address, _USERS) == {"liveness": True, **dead}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(address, "nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    for name in dead:
        assert (await _reason(address, name)).endswith("schema is at nothing")
    said = refusal((await asyncio.gather(stub_of(service).CreateUser(create()), return_exceptions=True))[0])
    assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "STARTING")
    async with watching(address, "startup", "readiness", "balancing", "liveness") as watched:
        assert (await migrate("users", made)).code == 0
        for name in ("startup", "readiness", "balancing"):
            assert watched.said[name][0] is False
            await watched.becomes(name, True)
        assert watched.said["liveness"] == [True]
    assert (await stub_of(service).CreateUser(create())).id
    _, told = await check(address, "readiness")
    assert told["tidings-schema"] == told["tidings-schema-required"] > "0000"
    assert set(told["tidings-notes"].split(",")) == {"local", "no-callers", "no-tls", "no-telemetry"}
    assert "tidings-reason" not in told


async def test_it_can_be_stopped_while_it_waits(databases: Databases, services: Services) -> None:
    service = services.notifications(await databases.blank("notifications"), _NOBODY)
    address = await _listening(service)
    await _until_reason(service, "waiting for the schema", name="startup")
    assert (await statuses(address, _NOTIFICATIONS))["liveness"]
    assert await service.stop() == 0


async def _lose_and_find(service: ServiceProcess, proxy: PostgresProxy, full_name: str) -> None:
    """Takes the database away, gives it back, and stops the service: what is said of each name meanwhile."""
    ready, always = ("readiness", "", full_name), ("liveness", "startup")
    async with watching(service.address, *ready, "balancing", *always) as watched:
        proxy.refusing = True
        proxy.cut()
        for name in ready:
            await watched.becomes(name, False)
        await _until_reason(service, "the database", "the feed cannot be read")
        proxy.refusing = False
        for name in ready:
            await watched.becomes(name, True)
        assert watched.said["balancing"] == [True]
        service.send(signal.SIGTERM)
        for name in ready:
            await watched.becomes(name, False)
        await watched.saw("balancing", True, False)
        assert await service.wait() == 0
        for name in always:
            assert watched.said[name] == [True]
    assert service.events("not ready")


async def test_a_database_that_goes_away_and_a_drain_of_the_user_service(
    users_database: Database, services: Services, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database)).start()
    await _lose_and_find(service, proxy, _USERS)


async def test_a_database_that_goes_away_and_a_drain_of_the_notification_service(
    notifications_database: Database, services: Services, proxy: PostgresProxy
) -> None:
    service = await services.notifications(proxy.url(notifications_database), _NOBODY, drain_time=1).start()
    [[revision]] = await notifications_database.fetch("SELECT version_num FROM alembic_version")
    await notifications_database.fetch("UPDATE alembic_version SET version_num = '0000'")
    await _until_reason(service, f"the schema is at 0000, {revision} is needed")
    # Newer is fine: an image that is rolled back must run.
    await notifications_database.fetch("UPDATE alembic_version SET version_num = '9999'")
    await until(service.is_ready)
    assert (await check(service.address, "readiness"))[1]["tidings-schema"] == "9999"
    await _lose_and_find(service, proxy, _NOTIFICATIONS)


async def test_loops_of_the_user_service_that_hang(
    users_database: Database, services: Services, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database), seal_interval=0.1, **_IMPATIENT).start()
    stub = stub_of(service)
    async with watching(service.address, "liveness", "balancing") as watched:
        for loop in ("tailer", "sealer", "writer"):
            fault = proxy.arm(f"tidings-users-{loop}", Action.HOLD_BEFORE)
            calls = [stub.CreateUser(create())] if loop == "writer" else []
            await fault.happened()
            await _until_reason(service, f"the loop {loop} does not go round")
            assert not (await statuses(service.address))["readiness"]
            fault.release()
            await until(service.is_ready)
            for call in calls:
                assert (await call).id
        assert watched.said == {"liveness": [True], "balancing": [True]}
    told = "; ".join(record["reason"] for record in service.events("not ready"))
    for loop in ("tailer", "sealer", "writer"):
        assert f"the loop {loop} does not go round" in told


async def test_loops_of_the_notification_service_that_hang(
    databases: Databases, services: Services, proxy: PostgresProxy
) -> None:
    users = await services.users(await databases.users()).start()
    service = services.notifications(proxy.url(await databases.notifications()), users, **_IMPATIENT)
    await service.start()
    await service.wait_log("following the user feed")
    for application, words, loops in (
        ("dispatch", "deliveries.channel", ("email", "webhook")),
        ("inbox", "BEGIN", ("subscriber",)),
        ("queries", "notification_position", ("tail",)),
    ):
        fault = proxy.arm(f"tidings-notifications-{application}", Action.HOLD_BEFORE, sql_contains(words))
        await stub_of(users).CreateUser(create())
        await fault.happened()
        await _until_reason(service, *(f"the loop {loop} does not go round" for loop in loops))
        fault.release()
        await until(service.is_ready, 60, application)


async def test_who_hangs_for_long_is_not_alive(users_database: Database, services: Services) -> None:
    """The tailer waits for a lock of the table, then for a backend of Postgres that is stopped."""
    service = await services.users(users_database, poll_interval=0.1, overdue_after=2, stuck_after=6).start()
    async with watching(service.address, "readiness", "liveness") as watched:
        async with await users_database.connect() as connection, connection.transaction():
            await connection.execute("LOCK TABLE user_events IN ACCESS EXCLUSIVE MODE")
            await watched.becomes("readiness", False)
        await watched.becomes("readiness", True)
        [[backend]] = await users_database.fetch(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'tidings-users-tailer'"
        )
        os.kill(int(str(backend)), signal.SIGSTOP)
        try:
            await watched.becomes("readiness", False)
            await watched.becomes("liveness", False)
            assert await _reason(service.address, "liveness") == "the loop tailer is stuck"
        finally:
            os.kill(int(str(backend)), signal.SIGCONT)
        await watched.becomes("liveness", True)
        await watched.becomes("readiness", True)
    assert {record["reason"] for record in service.events("not alive")} == {"the loop tailer is stuck"}
    # First it is not sent callers any more, and only much later it is given up.
    order = [record["event"] for record in service.records if record["event"] in ("not ready", "not alive")]
    assert order.index("not ready") < order.index("not alive")


async def test_a_pause_of_the_whole_process_is_not_held_against_its_loops(
    users_database: Database, services: Services
) -> None:
    service = await services.users(users_database, poll_interval=0.1, overdue_after=4, stuck_after=5).start()
    async with watching(service.address, "readiness", "liveness") as watched:
        service.send(signal.SIGSTOP)
        await asyncio.sleep(6)
        service.send(signal.SIGCONT)
        assert (await stub_of(service).CreateUser(create())).id
        # Health looks every two seconds.
        await asyncio.sleep(2.5)
        assert watched.said == {"readiness": [True], "liveness": [True]}


async def test_a_loop_that_dies_ends_the_process(databases: Databases, services: Services) -> None:
    made = await databases.notifications()
    service = await services.notifications(made, _NOBODY, poll_interval=0.1, drain_time=0).start()
    await made.fetch("ALTER TABLE deliveries RENAME TO hidden")
    assert await service.wait() == 1
    died = service.events("background task died")[0]["task"]
    assert died in ("email", "tidier")
    assert service.events("stopping")[0]["reason"] == f"{died} died"
