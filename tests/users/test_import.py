"""ImportUsers over a real socket on a real Postgres: each user on its own, in order, and safe to send again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Sequence

import grpc
import grpc.aio
import pytest

from tests.harness import Database, Services, until
from tests.users.calls import Log, Refusal, Stub, create, refusal, refused, replay, stub_of, user
from tidings.users.v1 import users_pb2

Item = users_pb2.ImportUsersRequest.Item
Request = users_pb2.ImportUsersRequest
Response = users_pb2.ImportUsersResponse
Failure = users_pb2.ImportUsersResponse.Failure


def item(given: users_pb2.User, request_id: str | None = None) -> Item:
    """A user to import, with a request_id of its own unless one is given."""
    return Item(user=given, request_id=str(uuid.uuid4()) if request_id is None else request_id)


def items(count: int) -> list[Item]:
    """Users to import that no other call makes."""
    return [item(user()) for _ in range(count)]


def cut(given: Sequence[Item], size: int = 400) -> list[Request]:
    """As requests of at most so many users."""
    return [Request(users=given[first : first + size]) for first in range(0, len(given), size)]


async def imported(stub: Stub, requests: Iterable[Request]) -> list[Response]:
    """Every answer of an import that ends well; they must be in order and cumulative."""
    answers: list[Response] = []
    processed = created = failed = 0
    async for answer in stub.ImportUsers(iter(requests)):
        assert answer.processed > processed
        for failure in answer.failed:
            assert processed <= failure.index < answer.processed
        failed += len(answer.failed)
        processed, created = answer.processed, answer.created
        assert created + failed == processed
        answers.append(answer)
    return answers


async def broken(stub: Stub, requests: Iterable[Request]) -> tuple[int, Refusal]:
    """How many users were decided by an import that does not end well, and what it ended with."""
    processed = 0
    try:
        async for answer in stub.ImportUsers(iter(requests)):
            processed = answer.processed
    except grpc.aio.AioRpcError as error:
        return processed, refusal(error)
    raise AssertionError("it ended well")


def failures(answers: list[Response]) -> dict[int, Failure]:
    """The failures of an import by their index."""
    return {failure.index: failure for answer in answers for failure in answer.failed}


def reasons(answers: list[Response]) -> dict[int, str]:
    """The reasons of the failures of an import by their index."""
    return {index: failure.reason for index, failure in failures(answers).items()}


async def test_users_are_created_in_order_and_are_news(shared_stub: Stub, log: Log) -> None:
    given = items(1300)
    given[0].user.display_name = "Ἀθηνᾶ"
    requests = cut(given, 300)
    answers = await imported(shared_stub, requests)
    assert len(answers) >= len(requests)
    assert (answers[-1].processed, answers[-1].created) == (1300, 1300)
    found = await log.events()
    assert [event.user.username for event in found] == [one.user.username for one in given]
    assert [event.position for event in found] == list(range(log.position + 1, log.position + 1301))
    assert {event.type for event in found} == {users_pb2.UserEvent.CREATED}
    assert found[0].user == await shared_stub.GetUser(users_pb2.GetUserRequest(id=found[0].user.id))
    # Users of an import are no group: a token may stand after each.
    assert len(await log.events(max_batch=7)) == 1300


async def test_a_refused_user_is_told_by_its_index_and_stops_nobody(
    shared_stub: Stub, shared_database: Database, log: Log
) -> None:
    taken = await shared_stub.CreateUser(create())
    given = items(10)
    given[1].user.username = "A"
    given[1].user.locale = "?"
    given[3] = Item(request_id=str(uuid.uuid4()))
    given[4].user.email = taken.email.upper()
    given[6].request_id = "7"
    given[8].user.labels["big"] = "x" * 20_000
    answers = await imported(shared_stub, cut(given))
    assert [(answer.processed, answer.created) for answer in answers] == [(10, 5)]
    found = {
        index: (grpc_code(one), one.reason, [violation.field for violation in one.violations])
        for index, one in failures(answers).items()
    }
    assert found == {
        1: ("INVALID_ARGUMENT", "INVALID_FIELD", ["user.username", "user.locale"]),
        3: ("INVALID_ARGUMENT", "INVALID_FIELD", ["user", "user.username", "user.email"]),
        4: ("ALREADY_EXISTS", "EMAIL_TAKEN", ["user.email"]),
        6: ("INVALID_ARGUMENT", "INVALID_FIELD", ["request_id"]),
        8: ("RESOURCE_EXHAUSTED", "USER_TOO_LARGE", ["user"]),
    }
    [violation] = failures(answers)[4].violations
    assert violation.description.endswith(" is taken")
    assert failures(answers)[4].message == f"user.email: {violation.description}"
    names = [event.user.username for event in await log.events()]
    assert names == [taken.username] + [given[index].user.username for index in (0, 2, 5, 7, 9)]
    stored = await shared_database.fetch(
        "SELECT count(*) FROM answers WHERE request_id = ANY(%s::uuid[])",
        [one.request_id for index, one in enumerate(given) if index != 6],
    )
    assert stored == [(5,)]


def grpc_code(failure: Failure) -> str:
    """The name of a failure's code."""
    return next(code.name for code in grpc.StatusCode if code.value[0] == failure.code)


@pytest.mark.parametrize("size", [1, 7, 1500], ids=["one by one", "a few", "at once"])
async def test_of_users_that_want_the_same_the_first_wins(shared_stub: Stub, log: Log, size: int) -> None:
    taken = await shared_stub.CreateUser(create())
    given = items(1500 if size > 100 else 60)
    last = len(given) - 1
    given[10].user.username = given[3].user.username
    given[last].user.email = given[3].user.email.upper()
    # A refused user leaves its name to others: 20 is refused for its email, so 21 gets the name, and 22 does not.
    given[20].user.email = taken.email
    given[21].user.username = given[22].user.username = given[20].user.username
    answers = await imported(shared_stub, cut(given, size))
    assert reasons(answers) == {10: "USERNAME_TAKEN", last: "EMAIL_TAKEN", 20: "EMAIL_TAKEN", 22: "USERNAME_TAKEN"}
    names = [event.user.email for event in await log.events()][1:]
    assert names == [one.user.email for index, one in enumerate(given) if index not in (10, 20, 22, last)]
    # And so again.
    again = await imported(shared_stub, cut(given, 500))
    assert reasons(again).keys() == reasons(answers).keys()
    assert again[-1].created == answers[-1].created
    assert len(await log.events()) == len(names) + 1


class TestRequestIds:
    async def test_users_sent_again_are_counted_and_not_made_again(self, shared_stub: Stub, log: Log) -> None:
        given = items(900)
        await imported(shared_stub, cut(given[:600]))
        answers = await imported(shared_stub, cut(given, 250))
        assert (answers[-1].processed, answers[-1].created) == (900, 900)
        assert not failures(answers)
        assert len(await log.events()) == 900

    async def test_another_user_with_the_same_id_is_refused(self, shared_stub: Stub, log: Log) -> None:
        given = items(5)
        await imported(shared_stub, cut(given))
        changed = [item(user(), one.request_id) if index == 2 else one for index, one in enumerate(given)]
        answers = await imported(shared_stub, cut(changed))
        assert reasons(answers) == {2: "REQUEST_ID_REUSED"}
        assert [one.field for one in failures(answers)[2].violations] == ["request_id"]
        assert answers[-1].created == 4
        assert len(await log.events()) == 5

    @pytest.mark.parametrize("size", [1, 10], ids=["in requests of their own", "in one request"])
    async def test_an_id_twice_in_one_stream(self, shared_stub: Stub, log: Log, size: int) -> None:
        first, other = items(2)
        given = [first, first, item(user(), first.request_id), other]
        answers = await imported(shared_stub, cut(given, size))
        assert reasons(answers) == {2: "REQUEST_ID_REUSED"}
        assert answers[-1].created == 3
        assert len(await log.events()) == 2

    async def test_the_id_of_a_refused_user_may_be_used_again(self, shared_stub: Stub, log: Log) -> None:
        bad = item(user(locale="?"))
        assert reasons(await imported(shared_stub, cut([bad]))) == {0: "INVALID_FIELD"}
        mended = item(user(username=bad.user.username), bad.request_id)
        assert not reasons(await imported(shared_stub, cut([mended])))
        assert [event.user.username for event in await log.events()] == [bad.user.username]

    async def test_without_an_id_a_repetition_is_another_user(self, shared_stub: Stub, log: Log) -> None:
        bare = Item(user=user())
        assert not reasons(await imported(shared_stub, cut([bare, item(user())])))
        assert reasons(await imported(shared_stub, cut([bare]))) == {0: "USERNAME_TAKEN"}
        assert len(await log.events()) == 2


class TestFlow:
    async def test_a_client_that_waits_for_each_answer(self, shared_stub: Stub, log: Log) -> None:
        call = shared_stub.ImportUsers()
        for number in range(5):
            await call.write(Request(users=items(3)))
            answer = await call.read()
            assert isinstance(answer, Response)
            assert answer.processed == 3 * (number + 1)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert len(await log.events()) == 15

    async def test_each_request_has_an_answer(self, shared_stub: Stub, log: Log) -> None:
        requests = cut(items(300), 3)
        answers = await imported(shared_stub, requests)
        assert {3 * (number + 1) for number in range(100)} <= {answer.processed for answer in answers}

    async def test_an_import_of_nobody(self, shared_stub: Stub) -> None:
        assert await imported(shared_stub, []) == []

    async def test_a_request_without_users_ends_the_stream_after_the_others(self, shared_stub: Stub, log: Log) -> None:
        processed, said = await broken(shared_stub, [*cut(items(700)), Request(), *cut(items(5))])
        assert processed == 700
        assert (said.code, said.reason, said.fields) == (
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", ["users"],
        )  # fmt: skip
        assert len(await log.events()) == 700

    async def test_a_request_that_is_too_large(self, shared_stub: Stub, log: Log) -> None:
        call = shared_stub.ImportUsers()
        await call.write(Request(users=items(10)))
        answer = await call.read()
        assert isinstance(answer, Response)
        assert answer.processed == 10
        await call.write(Request(users=[item(user(labels={"big": "x" * 5_000_000}))]))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4194304" in (await call.details() or "")
        assert len(await log.events()) == 10

    async def test_long_failures_are_told_in_several_answers(self, shared_stub: Stub, log: Log) -> None:
        given = [item(user(labels={"k" * 60 + str(number): "v" * 300 for number in range(30)})) for _ in range(200)]
        answers = await imported(shared_stub, [Request(users=given)])
        assert len(answers) > 2
        assert max(answer.ByteSize() for answer in answers) < 1 << 20
        assert len(failures(answers)) == 200

    async def test_a_client_that_does_not_read_is_not_read_from(
        self, services: Services, users_database: Database
    ) -> None:
        # gRPC takes in as much as fits into its windows: the client's stays as it begins, without probes, and the
        # server's, which grows, is small beside all that is to be sent.
        stub = stub_of(await services.users(users_database).start(), ("grpc.http2.bdp_probe", 0))
        call = stub.ImportUsers()
        bad = user(username="?" * 60, locale="?" * 60, time_zone="?" * 60, display_name="x" * 10_000)
        count, each = 200, 100
        written = 0

        async def write() -> None:
            nonlocal written
            for _ in range(count):
                await call.write(Request(users=[*items(1), *[item(bad) for _ in range(each - 1)]]))
                written += 1
            await call.done_writing()

        writing = asyncio.create_task(write())
        quiet = 0
        before = -1
        while quiet < 20:
            quiet, before = (quiet + 1 if written == before else 0), written
            await asyncio.sleep(0.05)
        assert 0 < written < count / 2
        stored = await users_database.fetch("SELECT count(*) FROM users")
        assert int(str(stored[0][0])) <= written
        # It delays nobody, and goes on when it is read.
        await stub.CreateUser(create())
        last = Response()
        async for answer in call:
            last = answer
        await writing
        assert (last.processed, last.created) == (count * each, count)
        assert await users_database.fetch("SELECT count(*) FROM users") == [(count + 1,)]

    async def test_a_replica_serves_a_bounded_number_of_imports(
        self, services: Services, users_database: Database
    ) -> None:
        stub = stub_of(await services.users(users_database, max_imports=1).start())
        first = stub.ImportUsers()
        await first.write(Request(users=items(1)))
        await first.read()
        for _ in range(10):
            processed, said = await broken(stub, cut(items(1)))
            # If a call ends during a write, grpc.aio may say INTERNAL in place of what it ended with.
            if said.code is not grpc.StatusCode.INTERNAL:
                break
        assert (processed, said.code, said.reason) == (
            0, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS",
        )  # fmt: skip
        await stub.CreateUser(create())
        first.cancel()

        async def is_free() -> bool:
            try:
                return bool(await imported(stub, cut(items(1))))
            except grpc.aio.AioRpcError:
                return False

        await until(is_free)


async def test_calls_are_answered_while_imports_run(services: Services, users_database: Database) -> None:
    service = await services.users(users_database).start()
    stub = stub_of(service)
    running = [asyncio.create_task(imported(stub_of(service), cut(items(5000), 500))) for _ in range(3)]

    async def began() -> bool:
        return (await stub.GetFeed(users_pb2.GetFeedRequest())).head_position > 0

    await until(began)
    made = {(await stub.CreateUser(create())).id for _ in range(10)}
    for answers in await asyncio.gather(*running):
        assert answers[-1].created == 5000
    events = await replay(stub)
    places = [event.position for event in events if event.user.id in made]
    assert len(events) == 15_010
    assert len(places) == 10
    # All of them got their turn before the imports were done.
    assert places[-1] < 14_000


async def test_concurrent_imports_of_the_same_names(services: Services, users_database: Database) -> None:
    replicas = [stub_of(await services.users(users_database).start()) for _ in range(2)]
    wanted = items(1500)

    def lot(number: int) -> list[Item]:
        mine = [item(one.user) for one in wanted]
        return mine if number % 2 else mine[::-1]

    answers = await asyncio.gather(
        *(imported(replicas[number % 2], cut(lot(number), 130)) for number in range(4)),
    )
    assert sum(one[-1].created for one in answers) == 1500
    for one in answers:
        assert set(reasons(one).values()) <= {"USERNAME_TAKEN", "EMAIL_TAKEN"}
        assert one[-1].processed == 1500
    events = await replay(replicas[0])
    assert sorted(event.user.username for event in events) == sorted(one.user.username for one in wanted)
    assert await users_database.fetch("SELECT count(*) FROM users") == [(1500,)]


async def test_what_postgres_refuses_is_one_users_failure(services: Services, users_database: Database) -> None:
    # The indexes are the safety net of the decisions: one that the decisions do not know of.
    await users_database.fetch(
        "CREATE UNIQUE INDEX users_username_net ON users (display_name) WHERE display_name <> ''"
    )
    stub = stub_of(await services.users(users_database).start())
    given = items(300)
    for index in (40, 170, 299):
        given[index].user.display_name = "Ada"
    answers = await imported(stub, cut(given))
    assert reasons(answers) == {170: "USERNAME_TAKEN", 299: "USERNAME_TAKEN"}
    assert [event.user.username for event in await replay(stub)] == [
        one.user.username for index, one in enumerate(given) if index not in (170, 299)
    ]
    assert (await refused(stub.CreateUser(create(display_name="Ada")))).reason == "USERNAME_TAKEN"
