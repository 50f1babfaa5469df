"""A state machine of writers, subscribers and restarts: every answer is foretold, every promise is judged at the end.

Hypothesis draws what happens next: changes that succeed and changes that must be refused, streams that begin anywhere,
read a little, break off (also inside a group) and resume on another replica, replicas that are drained or killed, old
events that are sealed and removed.
A model of a few lines says what each call must be answered. At the end all streams are read to the head, and the
validator of the fault run judges the records.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
import uuid
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import grpc.aio
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from servicekit import database
from tests.faults.asking import reason_of
from tests.faults.following import Habit, channels, received, request_of, watch
from tests.faults.probes import tables
from tests.harness import Database, PostgresServer, ServiceProcess, Services, programs
from tests.proof.history import gather
from tests.proof.promises import judge
from tests.proof.records import Attempt, Closed, Intent, Message, Opened, Outcome, Record, state
from tidings.users.v1 import users_pb2, users_pb2_grpc
from user_service import retention, sealer

_REPLICAS = 2
_PATIENCE = 30.0
# They take longer than all the rest.
_MOST_RESTARTS = 2
Result = TypeVar("Result")

_habits = st.builds(
    Habit,
    name=st.just(""),
    start=st.sampled_from(["earliest", "now", "snapshot"]),
    max_batch=st.sampled_from([0, 1, 3]),
    include_previous=st.booleans(),
    selection=st.sampled_from(
        [None, None, {"labels": {"team": "red"}}, {"shard": [0, 2]}, {"labels": {"team": "blue"}, "shard": [1, 2]}]
    ),
)
_teams = st.sampled_from(["red", "blue"])
_any = st.integers(0, 1 << 16)


class Follower:
    """A session of one subscriber, and its open stream if there is one."""

    def __init__(self, habit: Habit, name: str, records: list[Record]) -> None:
        self._habit = habit
        self._name = name
        self._records = records
        self._streams = 0
        self._stream = ""
        self._call: Any = None
        self._token = ""
        self.position = 0
        self.is_caught_up = False
        self.is_lost = False

    @property
    def is_open(self) -> bool:
        """Whether a stream is open."""
        return self._call is not None

    def open(self, channel: grpc.aio.Channel, replica: int) -> None:
        """Begins, or goes on with the last token."""
        self._streams += 1
        self._stream = f"{self._name}/{self._streams}"
        habit, start = self._habit, "token" if self._token else self._habit.start
        self._records.append(
            Opened(
                self._stream, self._name, replica, time.monotonic(), start, self._token, 1.0, 0, habit.selection, True
            )
        )  # fmt: skip
        self._call = watch(channel, request_of(habit, start, self._token, 0))

    async def read(self) -> Message | None:
        """The next message, or None at the end of the stream."""
        try:
            async with asyncio.timeout(_PATIENCE):
                data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            reason, metadata = reason_of(error)
            # The validator will say whether rightly so.
            self.is_lost = reason == "POSITION_EXPIRED"
            self._close("server", error.code().name, reason, int(metadata.get("earliest_position", 0)))
            return None
        if data is grpc.aio.EOF:
            self._close("server", "OK", "")
            return None
        message = received(self._stream, data, time.monotonic())
        self._records.append(message)
        self.position = message.position
        self._token = message.token or self._token
        self.is_caught_up |= message.mark == "caught_up"
        return message

    def cut(self, reason: str = "cut") -> None:
        """Ends the stream."""
        if self._call is not None:
            self._call.cancel()
            self._close("reader", "", reason)

    async def read_to(self, position: int, channel: grpc.aio.Channel, replica: int) -> None:
        """Everything up to a position, over as many streams as it takes, unless that is no longer retained."""
        end = time.monotonic() + _PATIENCE
        while not self.is_lost and (not self.is_caught_up or self.position < position):
            assert time.monotonic() < end, f"{self._name} is at {self.position} and does not come to {position}"
            if not self.is_open:
                self.open(channel, replica)
            await self.read()

    def _close(self, by: str, code: str, reason: str, earliest: int = 0) -> None:
        self._records.append(Closed(self._stream, time.monotonic(), by, code, reason, earliest))
        self._call = None


class Feed(RuleBasedStateMachine):
    """The machine. Its users are kept as last answered."""

    loop: ClassVar[asyncio.AbstractEventLoop]
    postgres: ClassVar[PostgresServer]

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)
        self._records: list[Record] = []
        self._services = Services()
        self._database: Database | None = None
        self._replicas: list[ServiceProcess] = []
        self._channels: list[grpc.aio.Channel] = []
        self._users: dict[str, users_pb2.User] = {}
        self._followers: list[Follower] = []
        self._head = 0
        self._restarts = 0
        self._settled: list[tuple[str, str, Any]] = []

    def _do(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def begin(self) -> None:
        """A database and replicas of one's own."""

        async def start() -> None:
            self._database = made = await self.postgres.users_database()
            small = {"window_bytes": 1 << 20, "page_cache_bytes": 0, "drain_time": 1, "grace": 1}
            self._replicas = [self._services.users(made, **small) for _ in range(_REPLICAS)]
            await asyncio.gather(*(replica.start() for replica in self._replicas))
            self._channels = channels([replica.address for replica in self._replicas])
            self._stubs = [users_pb2_grpc.UserServiceStub(channel) for channel in self._channels]

        self._do(start())
        # Somebody must have received what is removed.
        self._chronicle = Follower(Habit("", "earliest"), "chronicle", self._records)
        self._followers.append(self._chronicle)

    # What must be answered

    def _living(self) -> list[users_pb2.User]:
        return [user for user in self._users.values() if not user.HasField("delete_time")]

    def _deleted(self) -> list[users_pb2.User]:
        return [user for user in self._users.values() if user.HasField("delete_time")]

    def _is_taken(self, username: str) -> bool:
        return any(user.username == username for user in self._living())

    def _call(self, replica: int, intent: Intent, request: Any, refusal: str | None) -> list[users_pb2.User]:
        """Asks, and holds the answer against what it must be."""
        number = replica % _REPLICAS
        self._records += [intent, Attempt(intent.op, number, time.monotonic())]
        try:
            answer = self._do(_answer(self._stubs[number], intent.method, request))
        except grpc.aio.AioRpcError as error:
            reason, _ = reason_of(error)
            self._records.append(Outcome(intent.op, time.monotonic(), "refused", reason, []))
            if reason != refusal:
                raise
            return []
        users = list(answer.users) if intent.method == "BatchCreateUsers" else [answer]
        self._records.append(Outcome(intent.op, time.monotonic(), "done", "", [state(user) for user in users]))
        assert refusal is None, f"{refusal} was due"
        self._settled.append((intent.op, intent.method, request))
        for user in users:
            known = self._users.get(user.id)
            assert user.version == (known.version + 1 if known else 1)
            self._users[user.id] = user
        self._head += len(users)
        return users

    def _intent(self, method: str, tags: list[str], user_id: str = "") -> Intent:
        return Intent(f"op {next(self._numbers)}", method, time.monotonic(), tags, user_id)

    def _create_request(self, team: str, username: str = "") -> users_pb2.CreateUserRequest:
        tag = f"tag-{next(self._numbers)}"
        user = users_pb2.User(
            username=username or tag, email=f"{tag}@example.com", display_name=tag, labels={"team": team}
        )
        return users_pb2.CreateUserRequest(user=user, request_id=str(uuid.uuid4()))

    # Changes

    @rule(replica=_any, team=_teams)
    def create(self, replica: int, team: str) -> None:
        """A new user."""
        request = self._create_request(team)
        self._call(replica, self._intent("CreateUser", [request.user.display_name]), request, None)

    @precondition(lambda self: self._living())
    @rule(replica=_any, which=_any)
    def create_taken(self, replica: int, which: int) -> None:
        """A username that somebody has."""
        living = self._living()
        request = self._create_request("red", living[which % len(living)].username)
        self._call(replica, self._intent("CreateUser", [request.user.display_name]), request, "USERNAME_TAKEN")

    @rule(replica=_any, count=st.integers(2, 8), team=_teams, taken=st.booleans())
    def batch(self, replica: int, count: int, team: str, taken: bool) -> None:
        """All or none."""
        requests = [self._create_request(team) for _ in range(count)]
        refused = taken and bool(self._living())
        if refused:
            requests[-1].user.username = self._living()[0].username
        intent = self._intent("BatchCreateUsers", [request.user.display_name for request in requests])
        request = users_pb2.BatchCreateUsersRequest(requests=requests)
        self._call(replica, intent, request, "USERNAME_TAKEN" if refused else None)

    @precondition(lambda self: self._users)
    @rule(replica=_any, which=_any, team=_teams, version=st.sampled_from(["none", "current", "stale"]))
    def update(self, replica: int, which: int, team: str, version: str) -> None:
        """Other labels; refused for a stale version, and for a deleted user."""
        user = list(self._users.values())[which % len(self._users)]
        asked = {"none": 0, "current": user.version, "stale": user.version + 1}[version]
        intent = self._intent("UpdateUser", [f"tag-{next(self._numbers)}"], user.id)
        request = users_pb2.UpdateUserRequest(
            user={"id": user.id, "version": asked, "display_name": intent.tags[0], "labels": {"team": team}},
            update_mask={"paths": ["display_name", "labels"]},
            request_id=str(uuid.uuid4()),
        )
        refusal = "STALE_VERSION" if version == "stale" else None
        self._call(replica, intent, request, "USER_NOT_FOUND" if user.HasField("delete_time") else refusal)

    @precondition(lambda self: self._users)
    @rule(replica=_any, which=_any)
    def delete(self, replica: int, which: int) -> None:
        """Of whoever, also of a deleted one."""
        user = list(self._users.values())[which % len(self._users)]
        request = users_pb2.DeleteUserRequest(id=user.id, request_id=str(uuid.uuid4()))
        refusal = "USER_NOT_FOUND" if user.HasField("delete_time") else None
        self._call(replica, self._intent("DeleteUser", [], user.id), request, refusal)

    @precondition(lambda self: self._deleted())
    @rule(replica=_any, which=_any, steal=st.booleans())
    def undelete(self, replica: int, which: int, steal: bool) -> None:
        """Refused if somebody has taken the name."""
        deleted = self._deleted()
        user = deleted[which % len(deleted)]
        if steal and not self._is_taken(user.username):
            create = self._create_request("red", user.username)
            self._call(replica, self._intent("CreateUser", [create.user.display_name]), create, None)
        request = users_pb2.UndeleteUserRequest(id=user.id, request_id=str(uuid.uuid4()))
        refusal = "USERNAME_TAKEN" if self._is_taken(user.username) else None
        self._call(replica, self._intent("UndeleteUser", [], user.id), request, refusal)

    @precondition(lambda self: self._settled)
    @rule(replica=_any, which=_any)
    def ask_again(self, replica: int, which: int) -> None:
        """The same request on any replica: the same answer, and no event."""
        op, method, request = self._settled[which % len(self._settled)]
        self._records.append(Attempt(op, replica % _REPLICAS, time.monotonic()))
        answer = self._do(_answer(self._stubs[replica % _REPLICAS], method, request))
        users = list(answer.users) if method == "BatchCreateUsers" else [answer]
        self._records.append(Outcome(op, time.monotonic(), "done", "", [state(user) for user in users]))

    # Streams

    @rule(replica=_any, habit=_habits)
    def watch(self, replica: int, habit: Habit) -> None:
        """A new session."""
        follower = Follower(habit, f"session {len(self._followers)}", self._records)
        self._followers.append(follower)
        self._open(follower, replica)

    def _open(self, follower: Follower, replica: int) -> None:
        async def begin() -> None:
            follower.open(self._channels[replica % _REPLICAS], replica % _REPLICAS)
            await follower.read()

        self._do(begin())

    @precondition(lambda self: self._followers)
    @rule(which=_any, count=st.integers(1, 4))
    def read_some(self, which: int, count: int) -> None:
        """As many messages, or fewer if there is nothing more to come."""
        follower = self._followers[which % len(self._followers)]

        async def some() -> None:
            for _ in range(count):
                if not follower.is_open or (follower.is_caught_up and follower.position >= self._head):
                    break
                await follower.read()

        self._do(some())

    @precondition(lambda self: self._followers)
    @rule(which=_any)
    def disconnect(self, which: int) -> None:
        """Wherever it is."""
        self._followers[which % len(self._followers)].cut()

    def _closed(self) -> list[Follower]:
        return [follower for follower in self._followers if not follower.is_open and not follower.is_lost]

    @precondition(lambda self: self._closed())
    @rule(which=_any, replica=_any)
    def resume(self, which: int, replica: int) -> None:
        """On any replica."""
        closed = self._closed()
        self._open(closed[which % len(closed)], replica)

    # Old events

    @rule()
    def seal(self) -> None:
        """All of them, a few to a segment."""

        async def all_of_them() -> None:
            assert self._database is not None
            async with await self._database.connect() as connection:
                while await sealer.seal(connection, sealer.Rules(3, 0, timedelta(hours=1))):
                    pass

        self._do(all_of_them())

    @rule(replica=_any)
    def retain(self, replica: int) -> None:
        """Removes all that is sealed and that no open snapshot needs."""
        number = replica % _REPLICAS

        async def remove() -> None:
            assert self._database is not None
            await self._chronicle.read_to(self._head, self._channels[number], number)
            async with database.pool(self._database.admin_url, "test", size=1) as pool:
                while await retention.expire(pool, timedelta(0), None) is not None:
                    pass

        self._do(remove())

    # Replicas

    @precondition(lambda self: self._restarts < _MOST_RESTARTS)
    @rule(which=_any, how=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
    def restart(self, which: int, how: signal.Signals) -> None:
        """Killed or drained, and started again."""
        replica = self._replicas[which % _REPLICAS]
        self._restarts += 1

        async def again() -> None:
            await replica.kill(how)
            await replica.restart()

        self._do(again())

    # The end

    def teardown(self) -> None:
        """Every stream comes to the head; then everything is judged."""
        if not self._channels:
            self._do(self._end())
            return
        try:
            self._do(self._finish())
        finally:
            self._do(self._end())
        history = gather(self._records)
        assert history.head.head == self._head
        assert history.rows == {user.id: state(user) for user in self._users.values()}
        assert {verdict.promise: verdict.examples for verdict in judge(history) if verdict.broken} == {}

    async def _finish(self) -> None:
        for number in range(_REPLICAS):
            self._followers.append(Follower(Habit("", "earliest"), f"last {number}", self._records))
            self._followers.append(Follower(Habit("", "snapshot"), f"last copy {number}", self._records))
        for number, follower in enumerate(self._followers):
            replica = number % _REPLICAS
            await follower.read_to(self._head, self._channels[replica], replica)
            follower.cut("finished")
        assert self._database is not None
        self._records += await tables(self._database)

    async def _end(self) -> None:
        for follower in self._followers:
            follower.cut()
        for channel in self._channels:
            await channel.close()
        await self._services.stop()
        if self._database is not None:
            await self.postgres.drop(self._database)


async def _answer(stub: Any, method: str, request: Any) -> Any:
    """A replica that was just started may still refuse connections to a channel that waits to try again."""
    return await getattr(stub, method)(request, timeout=_PATIENCE, wait_for_ready=True)


@pytest.mark.timeout(300)
def test_the_feed_keeps_its_promises_in_any_order_of_events(postgres: PostgresServer) -> None:
    Feed.loop, Feed.postgres = asyncio.new_event_loop(), postgres
    try:
        run_state_machine_as_test(
            Feed,
            settings=settings(
                max_examples=4,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        Feed.loop.run_until_complete(programs.stop())
        Feed.loop.close()
