"""One change is one trace, from the caller's span to the mail, as a collector receives it from the real processes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.harness import Collector, Databases, MailCatcher, ServiceProcess, Services, free_port, until
from tests.harness.collector import tree
from tests.users.calls import Stub, stub_of
from tidings.client import Notifications, UserFeed, connect
from tidings.users.v1 import users_pb2

CREATE = "tidings.users.v1.UserService/CreateUser"


@pytest.fixture
def traced(services: Services, collector: Collector) -> Services:
    """Services that send their spans to the collector at once."""
    services.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    return services


def caller(*, sampled: bool = True) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """The ids of a caller's trace and span, and the metadata that tells of them."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, (("traceparent", f"00-{trace}-{span}-{'01' if sampled else '00'}"),)


def create(name: str) -> users_pb2.CreateUserRequest:
    return users_pb2.CreateUserRequest(user=users_pb2.User(username=name, email=f"{name}@example.com"))


async def test_one_change_is_one_trace_through_a_restart(
    databases: Databases, traced: Services, mail_catcher: MailCatcher, collector: Collector
) -> None:
    users = await traced.users(await databases.users()).start()
    database = await databases.notifications()
    # Nobody takes mail yet.
    first = traced.notifications(database, users, smtp_port=free_port(), retry_base=0.2, retry_cap=0.2, tries=100)
    await first.start()
    trace, span, metadata = caller()
    user = await stub_of(users).CreateUser(create("ada"), metadata=metadata)
    # An attempt that failed was told, for the process is killed.
    await until(lambda: _exported(collector, trace, "deliver email"))
    await first.kill()
    second = await traced.notifications(database, users, mail_catcher, retry_base=0.2, retry_cap=0.2, tries=100).start()
    await until(lambda: _delivered(second))
    assert (await second.stop(), await users.stop()) == (0, 0)

    spans = collector.trace(trace)
    print("\n" + "\n".join(tree(spans)))
    [server] = [one for one in spans if one.parent == span]
    [wait, send] = [one for one in spans if one.parent == server.id]
    [process] = [one for one in spans if one.parent == send.id]
    [store, *attempts] = [one for one in spans if one.parent == process.id]
    assert spans == sorted((server, wait, send, process, store, *attempts), key=lambda one: one.start)
    assert [one.name for one in (server, wait, send, process, store)] == [
        CREATE,
        "wait for commit",
        "send user_events",
        "process user_events",
        "store inbox",
    ]
    assert [one.kind for one in (server, wait, send, process, store)] == [
        "SERVER",
        "INTERNAL",
        "PRODUCER",
        "CONSUMER",
        "INTERNAL",
    ]
    assert {one.service for one in (server, wait, send)} == {"tidings-users"}
    assert {one.service for one in (process, store, *attempts)} == {"tidings-notifications"}
    assert server.attributes["rpc.system.name"] == "grpc"
    assert server.attributes["rpc.response.status_code"] == "OK"
    assert send.attributes["tidings.position"] == process.attributes["tidings.position"] == 1
    assert send.attributes["messaging.destination.name"] == "user_events"
    # Every attempt, of both processes; those that the first did not tell before the kill are unknown.
    assert {(one.name, one.kind) for one in attempts} == {("deliver email", "CLIENT")}
    numbers = [one.attributes["tidings.attempt"] for one in attempts]
    assert numbers == sorted(set(numbers))
    assert [one.is_error for one in attempts] == [True] * (len(attempts) - 1) + [False]
    assert len(attempts) >= 2
    # The mail carries the context of the attempt that sent it.
    [mail] = mail_catcher.messages()
    assert mail.message["Traceparent"].split("-")[1:3] == [trace, attempts[-1].id]
    # The commit belongs to no caller: it links to the call that waited for it, which links back.
    [commit] = collector.named("commit batch")
    assert commit.trace != trace
    assert commit.parent == ""
    assert commit.links == ((trace, wait.id),)
    assert wait.links == ((commit.trace, commit.id),)
    below = [one.name for one in collector.trace(commit.trace) if one.parent == commit.id]
    assert below == ["lock and read", "write and commit"]
    told = [
        value for one in collector.spans for value in (one.name, one.description, *map(str, one.attributes.values()))
    ]
    assert not [value for value in told if "ada" in value or user.email in value]


async def _exported(collector: Collector, trace: str, name: str) -> bool:
    return any(span.name == name for span in collector.trace(trace))


async def _delivered(process: ServiceProcess) -> bool:
    async with connect(process.address) as channel:
        inbox = await Notifications(channel).inbox()
    return inbox.delivered > 0 and not inbox.pending


async def test_no_trace_holds_a_span_of_another_caller(
    databases: Databases, traced: Services, mail_catcher: MailCatcher, collector: Collector
) -> None:
    users = await traced.users(await databases.users()).start()
    notifications = await traced.notifications(await databases.notifications(), users, mail_catcher).start()
    traces: dict[str, str] = {}  # by username

    async def call(name: str, stub: Stub) -> None:
        for number in range(5):
            trace, _, metadata = caller()
            traces[f"{name}-{number}"] = trace
            await stub.CreateUser(create(f"{name}-{number}"), metadata=metadata)

    stub = stub_of(users)
    await asyncio.gather(*(call(f"caller{number}", stub) for number in range(16)))
    await until(lambda: _delivered(notifications))
    events: dict[str, users_pb2.UserEvent] = {}
    async with connect(users.address) as channel:
        async for batch in UserFeed(channel, start="earliest"):
            events |= {event.user.username: event for event in batch.events}
            if len(events) == len(traces):
                break
    await until(lambda: _all_delivered(notifications, len(traces)))
    assert (await notifications.stop(), await users.stop()) == (0, 0)

    for name, trace in traces.items():
        spans = collector.trace(trace)
        assert sorted(span.name for span in spans if span.name != "store inbox") == [
            "deliver email",
            "process user_events",
            "send user_events",
            CREATE,
            "wait for commit",
        ]
        positions = {span.attributes["tidings.position"] for span in spans if "tidings.position" in span.attributes}
        assert positions == {events[name].position}
        assert events[name].trace_parent.split("-")[1] == trace
    # Batches have traces of their own, which nobody else is in.
    waits = {(span.trace, span.id): span for span in collector.named("wait for commit")}
    commits = collector.named("commit batch")
    assert len(commits) < len(traces)
    assert sorted(link for commit in commits for link in commit.links) == sorted(waits)
    for commit in commits:
        assert commit.trace not in traces.values()
        assert {span.name for span in collector.trace(commit.trace)} == {
            "commit batch",
            "lock and read",
            "write and commit",
        }
        assert all(waits[link].links == ((commit.trace, commit.id),) for link in commit.links)


async def _all_delivered(process: ServiceProcess, count: int) -> bool:
    async with connect(process.address) as channel:
        return (await Notifications(channel).inbox()).delivered == count


async def test_what_makes_no_spans_and_how_calls_end(
    databases: Databases, traced: Services, collector: Collector
) -> None:
    database = await databases.users()
    users = await traced.users(database, poll_interval=0.05).start()
    stub = stub_of(users)
    trace, _, metadata = caller()
    ada = await stub.CreateUser(create("ada"), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.CreateUser(create("ada"), metadata=metadata)
    await stub.GetUser(users_pb2.GetUserRequest(id=ada.id), metadata=metadata)
    # A caller that gives up while another session holds the feed.
    async with await psycopg.AsyncConnection.connect(database.url) as other:
        await other.execute("SELECT * FROM feed FOR UPDATE")
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await stub.CreateUser(create("eve"), metadata=metadata, timeout=0.5)
        assert gone.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The server finds out by itself, perhaps a moment later.
        await asyncio.sleep(1.0)
    # What nobody samples, and what is no change: streams, probes, polls.
    unsampled, _, refused = caller(sampled=False)
    await stub.CreateUser(create("bob"), metadata=refused)
    async with connect(users.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest(service="readiness"), metadata=metadata)
        async for batch in UserFeed(channel, start="earliest", bookmark_interval=1.0, progress=True):
            if not batch.events:
                break
    assert await users.stop() == 0

    assert not collector.trace(unsampled)
    spans = collector.trace(trace)
    codes = [
        (span.name.partition("/")[2], span.attributes["rpc.response.status_code"]) for span in spans if "/" in span.name
    ]
    assert codes == [
        ("CreateUser", "OK"),
        ("CreateUser", "ALREADY_EXISTS"),
        ("GetUser", "OK"),
        ("CreateUser", "DEADLINE_EXCEEDED"),
    ]
    refusal = next(span for span in spans if span.attributes.get("rpc.response.status_code") == "ALREADY_EXISTS")
    assert (refusal.attributes["error.type"], refusal.is_error) == ("USERNAME_TAKEN", False)
    late = next(span for span in spans if span.attributes.get("rpc.response.status_code") == "DEADLINE_EXCEEDED")
    assert (late.attributes["error.type"], late.is_error) == ("DEADLINE_EXCEEDED", True)
    get = next(span for span in spans if span.name.endswith("/GetUser"))
    assert [span.name for span in spans if span.parent == get.id] == ["SELECT"]
    known = {CREATE, get.name, "SELECT", "wait for commit", "send user_events", "commit batch", "lock and read"}
    assert {span.name for span in collector.spans} == known | {"write and commit"}


async def test_each_change_of_an_import_is_a_trace_of_its_own(
    databases: Databases, traced: Services, mail_catcher: MailCatcher, collector: Collector
) -> None:
    users = await traced.users(await databases.users()).start()
    notifications = await traced.notifications(await databases.notifications(), users, mail_catcher).start()
    trace, span, metadata = caller()
    items = [users_pb2.ImportUsersRequest.Item(user=create(f"user{number}").user) for number in range(3)]

    async def requests() -> AsyncIterator[users_pb2.ImportUsersRequest]:
        yield users_pb2.ImportUsersRequest(users=items)

    answers = [answer async for answer in stub_of(users).ImportUsers(requests(), metadata=metadata)]
    assert answers[-1].created == len(items)
    await until(lambda: _all_delivered(notifications, len(items)))
    assert (await notifications.stop(), await users.stop()) == (0, 0)

    assert not collector.trace(trace)
    sends = collector.named("send user_events")
    assert [send.attributes["tidings.position"] for send in sends] == [1, 2, 3]
    assert all(send.links == ((trace, span),) and not send.parent for send in sends)
    for send in sends:
        names = {one.name for one in collector.trace(send.trace)}
        assert names - {"store inbox"} == {"send user_events", "process user_events", "deliver email"}
