"""Imports under faults, through the shipped client: every user exactly once, and no false failure."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import grpc
import pytest

from tests.harness import Action, Database, PostgresProxy, ServiceProcess, Services, is_commit, until
from tests.users.calls import create, replay, stub_of, user
from tests.users.test_import import broken, cut, failures, imported, items, reasons
from tidings.client import ApiError, ImportFailure, Users, connect
from tidings.users.v1 import users_pb2

WRITER = "tidings-users-writer"

Given = list[tuple[users_pb2.User, str | None]]


def people(count: int) -> Given:
    """Users that no other call makes, each with a request_id."""
    return [(user(), str(uuid.uuid4())) for _ in range(count)]


@dataclass
class Importing:
    """An import by the shipped client, and what it has heard."""

    processed: int = 0
    created: int = 0
    failed: list[ImportFailure] = field(default_factory=list)

    async def run(
        self, address: str, source: Iterable[tuple[users_pb2.User, str | None]], **options: float
    ) -> Importing:
        """To its end."""
        async with connect(address) as channel:
            async for progress in Users(channel).import_users(source, **options):
                assert progress.processed >= self.processed
                assert all(self.processed <= one.index < progress.processed for one in progress.failed)
                self.processed, self.created = progress.processed, progress.created
                self.failed += progress.failed
        return self


async def exactly(database: Database, service: ServiceProcess, given: Given) -> None:
    """Each of these users is stored once and was told of once, in order; nobody else is there."""
    events = await replay(stub_of(service))
    assert [event.user.username for event in events] == [one.username for one, _ in given]
    assert await database.fetch("SELECT count(*), count(DISTINCT username) FROM users") == [(len(given), len(given))]


async def test_sigterm_ends_an_import_after_what_it_has_taken(services: Services, users_database: Database) -> None:
    first = await services.users(users_database).start()
    second = await services.users(users_database).start()
    given = items(8000)
    running = asyncio.create_task(broken(stub_of(first), cut(given)))

    async def began() -> bool:
        return (await stub_of(second).GetFeed(users_pb2.GetFeedRequest())).head_position > 1000

    await until(began)
    first.send(signal.SIGTERM)
    processed, said = await running
    assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert await first.wait() == 0
    # What was decided was answered, and nothing else was stored.
    assert await users_database.fetch("SELECT count(*) FROM users") == [(processed,)]
    assert 1000 < processed < 8000
    answers = await imported(stub_of(second), cut(given[processed:]))
    assert answers[-1].created == 8000 - processed
    events = await replay(stub_of(second))
    assert [event.user.username for event in events] == [one.user.username for one in given]


async def test_an_idle_import_does_not_hold_up_a_shutdown(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, drain_time=60).start()
    call = stub_of(service).ImportUsers()
    await call.write(users_pb2.ImportUsersRequest(users=items(1)))
    await call.read()
    service.send(signal.SIGTERM)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await service.wait() == 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
async def test_a_service_that_goes_and_comes_back(
    services: Services, users_database: Database, signum: signal.Signals
) -> None:
    service = await services.users(users_database).start()
    given = people(6000)
    bad = {3000, 3001, 5000}
    for index in bad:
        given[index][0].locale = "?"
    importing = Importing()
    running = asyncio.create_task(importing.run(service.address, given))
    for share in (500, 2000):
        await until(lambda share=share: importing.processed > share or (running.done() and running.result()))  # type: ignore[misc]
        assert not running.done()
        await service.kill(signum)
        await service.restart()
    await running
    assert (importing.processed, importing.created) == (6000, 6000 - len(bad))
    assert {(one.index, one.error.reason) for one in importing.failed} == {(index, "INVALID_FIELD") for index in bad}
    assert len(importing.failed) == len(bad)
    await exactly(users_database, service, [one for index, one in enumerate(given) if index not in bad])


@pytest.mark.parametrize("action", [Action.CUT_BEFORE, Action.CUT_AFTER])
async def test_a_connection_lost_around_commit_is_not_noticed(
    services: Services, users_database: Database, proxy: PostgresProxy, action: Action
) -> None:
    service = await services.users(proxy.url(users_database)).start()
    stub = stub_of(service)
    given = items(1200)
    given[700].user.username = given[20].user.username
    fault = proxy.arm(WRITER, action, is_commit, times=2)
    answers = await imported(stub, cut(given))
    assert fault.hits == 2
    assert reasons(answers) == {700: "USERNAME_TAKEN"}
    events = await replay(stub)
    assert [event.user.username for event in events] == [
        one.user.username for index, one in enumerate(given) if index != 700
    ]


async def test_an_outcome_that_cannot_be_learnt_ends_the_stream(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database), unknown_outcome_wait=0.5).start()
    stub = stub_of(service)
    given = items(10)
    given[3].user.locale = "?"
    call = stub.ImportUsers()
    await call.write(users_pb2.ImportUsersRequest(users=given[:5]))
    first = await call.read()
    assert isinstance(first, users_pb2.ImportUsersResponse)
    assert reasons([first]) == {3: "INVALID_FIELD"}
    fault = proxy.arm(WRITER, Action.HOLD_AFTER, is_commit)
    await call.write(users_pb2.ImportUsersRequest(users=given[5:]))
    await fault.happened()
    proxy.refusing = True
    proxy.cut()
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert "the outcome of the change is not known" in (await call.details() or "")
    proxy.refusing = False
    await until(service.is_ready)
    answers = await imported(stub, cut(given))
    assert (answers[-1].created, set(failures(answers))) == (9, {3})
    assert await users_database.fetch("SELECT count(*) FROM users") == [(9,)]


async def test_a_database_that_is_away_is_waited_for(
    services: Services, users_database: Database, proxy: PostgresProxy
) -> None:
    service = await services.users(proxy.url(users_database), unknown_outcome_wait=0.5).start()
    given = people(4000)
    importing = Importing()
    running = asyncio.create_task(importing.run(service.address, given))
    await until(lambda: importing.processed > 500)
    proxy.refusing = True
    proxy.cut()

    async def is_told() -> bool:
        processed, said = await broken(stub_of(service), cut(items(1)))
        return (processed, said.reason) == (0, "DATABASE_UNAVAILABLE")

    await until(is_told, 30)
    assert not running.done()
    proxy.refusing = False
    await running
    assert (importing.created, importing.failed) == (4000, [])
    await exactly(users_database, service, given)


class TestClient:
    async def test_a_source_that_trickles_delays_nobody(self, services: Services, users_database: Database) -> None:
        service = await services.users(users_database).start()
        given = people(20)
        asked = asyncio.Event()

        async def source() -> AsyncIterator[tuple[users_pb2.User, str | None]]:
            for one in given:
                yield one
                await asked.wait()
                asked.clear()

        async with connect(service.address) as channel:
            seen = 0
            async for progress in Users(channel).import_users(source()):
                seen += 1
                assert (progress.processed, progress.created) == (seen, seen)
                asked.set()
        assert seen == 20
        await exactly(users_database, service, given)

    async def test_a_source_that_fails_is_told_after_what_came_before(
        self, services: Services, users_database: Database
    ) -> None:
        service = await services.users(users_database).start()
        given = people(700)

        def source() -> Iterable[tuple[users_pb2.User, str | None]]:
            yield from given
            raise ValueError("the file ends here")

        importing = Importing()
        with pytest.raises(ValueError, match="the file ends here"):
            await importing.run(service.address, source())
        assert importing.created == 700
        await exactly(users_database, service, given)

    async def test_the_source_is_read_as_far_as_is_needed(self, services: Services, users_database: Database) -> None:
        service = await services.users(users_database).start()
        read = 0

        def source() -> Iterable[tuple[users_pb2.User, str | None]]:
            nonlocal read
            while True:
                read += 1
                yield user(), None

        async with connect(service.address) as channel:
            progress = Users(channel).import_users(source())
            assert (await anext(progress)).processed > 0
            assert read <= 5000
            await progress.aclose()

    async def test_nobody_to_import_needs_no_service(self) -> None:
        assert (await Importing().run("127.0.0.1:1", [])).processed == 0

    async def test_a_service_that_is_away_for_too_long(self) -> None:
        with pytest.raises(ApiError) as caught:
            await Importing().run("127.0.0.1:1", people(1), retry_for=0.5)
        assert caught.value.is_temporary

    async def test_a_refused_user_is_an_error_with_its_fields(
        self, services: Services, users_database: Database
    ) -> None:
        service = await services.users(users_database).start()
        await stub_of(service).CreateUser(create(username="ada"))
        importing = await Importing().run(service.address, [(user(username="ada"), None), (user(locale="?"), None)])
        taken, wrong = importing.failed
        assert (taken.index, taken.error.code, taken.error.reason) == (
            0, grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN",
        )  # fmt: skip
        assert taken.error.violations == (("user.username", "ada is taken"),)
        assert (wrong.index, wrong.error.code) == (1, grpc.StatusCode.INVALID_ARGUMENT)
        assert [one.field for one in wrong.error.violations] == ["user.locale"]
