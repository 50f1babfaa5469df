"""What a user service says of itself: the numbers are those of what was done, their labels those that are declared."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import servicekit.metrics
from servicekit import database
from servicekit.instruments import Histogram
from tests.harness import Callers, Collector, Database, Scrape, ServiceProcess, Services, scrape, until
from tests.users.calls import Stub, create, read, refused, stub_of
from tidings.client import Users, connect
from tidings.users.v1 import users_pb2
from user_service import metrics, reads

SERVICE = "tidings.users.v1.UserService"
Request = users_pb2.WatchUsersRequest
DECLARED = {one.prometheus_name: one for one in (*servicekit.metrics.INSTRUMENTS, *metrics.INSTRUMENTS)}


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    """A file of callers."""
    return Callers(tmp_path / "callers.toml")


def calls(scraped: Scrape, method: str, code: str) -> float:
    """How many calls of a method ended with a status."""
    return scraped.value(
        "rpc_server_call_duration_seconds_count", rpc_method=f"{SERVICE}/{method}", rpc_response_status_code=code
    )


async def test_the_numbers_are_those_of_what_was_done(
    services: Services, users_database: Database, callers: Callers, collector: Collector
) -> None:
    services.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_TRACES_EXPORTER": "none"}
    admin, reader = callers.add("admin"), callers.add("crm", "WatchUsers")
    service = await services.users(
        users_database, metrics_address="127.0.0.1:0", callers_file=callers.path, linger=0
    ).start()
    stub = Stub(connect(service.address, token=admin))
    stream = Stub(connect(service.address, token=reader)).WatchUsers(Request(now={}))
    assert [(await read(stream)).WhichOneof("mark") for _ in range(2)] == ["bookmark", "caught_up"]
    for name in ("ada", "bob", "eve"):
        await stub.CreateUser(create(username=name))
        assert [event.user.username for event in (await read(stream)).events] == [name]
    assert (await refused(stub.CreateUser(create(username="ada")))).code is grpc.StatusCode.ALREADY_EXISTS
    assert (await refused(stub.CreateUser(create(username="Ada")))).code is grpc.StatusCode.INVALID_ARGUMENT
    importing = Users(connect(service.address, token=admin)).import_users([(_user("one"), None), (_user("two"), None)])
    assert [progress.created async for progress in importing][-1] == 2
    received: list[users_pb2.UserEvent] = []
    while len(received) < 2:
        received += (await read(stream)).events
    # Who has no token has no name, and a method that is none makes no label.
    assert (await refused(Stub(connect(service.address)).GetFeed(users_pb2.GetFeedRequest()))).reason == "MISSING_TOKEN"
    async with connect(service.address, token=admin) as channel:
        drop: Any = channel.unary_unary("/tidings.users.v1.UserService/DropUsers")
        with pytest.raises(grpc.aio.AioRpcError):
            await drop(b"")

    # Streams are looked at every second.
    await until(lambda: _caught_up(service))
    scraped = await scrape(service)
    assert calls(scraped, "CreateUser", "OK") == 3
    assert calls(scraped, "CreateUser", "ALREADY_EXISTS") == 1
    assert calls(scraped, "CreateUser", "INVALID_ARGUMENT") == 1
    assert calls(scraped, "ImportUsers", "OK") == 1
    assert calls(scraped, "GetFeed", "UNAUTHENTICATED") == 1
    assert calls(scraped, "WatchUsers", "OK") == 0
    assert scraped.value("tidings_feed_head") == scraped.value("tidings_feed_window_events") == 5
    assert scraped.value("tidings_feed_earliest") == 1
    assert scraped.value("tidings_feed_window_bytes") > 5 * 36
    assert scraped.value("messaging_client_sent_messages_total", messaging_destination_name="user_events") == 5
    assert 4 <= scraped.value("tidings_feed_commit_to_sent_seconds_count") <= 5
    assert scraped.value("tidings_rpc_server_active_streams", rpc_method=f"{SERVICE}/WatchUsers") == 1
    assert scraped.value("tidings_feed_subscribers", caller="crm") == 1
    assert scraped.value("tidings_feed_subscriber_lag_events", caller="crm") == 0
    assert scraped.value("tidings_feed_subscriber_lag_time_seconds", caller="crm") == 0
    # The one that was refused for its name was decided in a batch as well, the other was not.
    assert scraped.value("tidings_commit_batch_size_count", lane="calls") == 4
    assert scraped.value("tidings_commit_batch_size_sum", lane="calls") == 4
    assert scraped.value("tidings_commit_batch_size_sum", lane="imports") == 2
    assert scraped.value("tidings_commit_wait_seconds_count", lane="calls") == 4
    assert scraped.value("tidings_commit_duration_seconds_count", lane="calls", outcome="committed") == 3
    assert scraped.value("tidings_commit_duration_seconds_count", lane="calls", outcome="refused") == 1
    assert scraped.value("tidings_commit_queue") == 0
    assert scraped.value("tidings_ready") == 1
    assert {one.value for one in scraped.all("tidings_background_alive")} == {1}
    assert scraped.has("tidings_background_alive", task="writer")
    queries = {"db_client_connection_pool_name": "tidings-users-queries"}
    assert scraped.value("db_client_connection_max", **queries) == 8
    assert 1 <= scraped.value("db_client_connection_count", **queries) <= 8
    assert scraped.value("tidings_event_loop_delay_seconds_count") > 0
    bounded(scraped, callers={"crm"})

    stream.cancel()
    await until(lambda: _has_ended(service, "WatchUsers", "CANCELLED"), what="the end of the stream is counted")
    await until(lambda: _without(service, "tidings_feed_subscribers"))

    # A caller whose time is over while another session holds the feed; one that leaves.
    async with await users_database.connect() as other, other.transaction():
        await other.execute("SELECT * FROM feed FOR UPDATE")
        assert (await refused(stub.CreateUser(create(), timeout=0.5))).code is grpc.StatusCode.DEADLINE_EXCEEDED
        leaving = stub.CreateUser(create(), timeout=60)
        await until(lambda: _waits(service))
        leaving.cancel()
        await until(lambda: _has_ended(service, "CreateUser", "CANCELLED"))
    assert calls(await scrape(service), "CreateUser", "DEADLINE_EXCEEDED") == 1
    assert await service.stop() == 0
    # What was pushed at the end is the same.
    pushed = {"rpc_method": f"{SERVICE}/CreateUser", "rpc_response_status_code": "OK"}
    assert collector.last("rpc.server.call.duration", **pushed) == 3
    assert collector.last("tidings.feed.earliest") == 1
    assert collector.last("messaging.client.sent.messages") == 5
    assert {point.service for point in collector.points} == {"tidings-users"}
    assert collector.spans == []


def _user(name: str) -> users_pb2.User:
    return users_pb2.User(username=name, email=f"{name}@example.com")


async def _has_ended(service: ServiceProcess, method: str, code: str) -> bool:
    labels = {"rpc_method": f"{SERVICE}/{method}", "rpc_response_status_code": code}
    return (await scrape(service)).has("rpc_server_call_duration_seconds_count", **labels)


async def _waits(service: ServiceProcess) -> bool:
    return (await scrape(service)).value("tidings_commit_queue", lane="calls") >= 1


def bounded(scraped: Scrape, callers: set[str]) -> None:
    """Every series is of an instrument and has its attributes; their values are of sets that are known."""
    for sample in scraped.samples:
        name = sample.name
        for suffix in ("_bucket", "_sum", "_count"):
            name = name if name in DECLARED else sample.name.removesuffix(suffix)
        one = DECLARED[name]
        labels = set(sample.labels) - {"le"}
        assert labels == {key.replace(".", "_") for key in one.attributes}, sample
        assert ("le" in sample.labels) == (isinstance(one, Histogram) and sample.name.endswith("_bucket"))
    values = {
        label: {one.labels[label] for one in scraped.samples if label in one.labels}
        for label in {label for one in scraped.samples for label in one.labels}
    }
    known = {
        "caller": callers,
        "lane": {"calls", "imports"},
        "outcome": {"committed", "refused", "aborted", "unknown"},
        "rpc_system_name": {"grpc"},
        "rpc_response_status_code": {code.name for code in grpc.StatusCode},
        "rpc_method": {
            *(f"{SERVICE}/{method.name}" for method in users_pb2.DESCRIPTOR.services_by_name["UserService"].methods),
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        },
        "db_client_connection_state": {"used", "idle"},
        "messaging_destination_name": {"user_events"},
    }
    for label, allowed in known.items():
        assert values[label] <= allowed, label
    assert set(values) - set(known) == {"le", "task", "db_client_connection_pool_name"}


async def test_who_stops_reading_is_seen_to_be_behind(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, metrics_address="127.0.0.1:0", window_bytes=1 << 20).start()
    # By the protocol's own window, which does not grow: what is not read stays with the server.
    stuck = stub_of(service, ("grpc.http2.bdp_probe", 0)).WatchUsers(Request(earliest={}))
    await read(stuck)
    large = {f"key-{n}": "v" * 250 for n in range(30)}
    stub = stub_of(service)
    for _ in range(4):
        await asyncio.gather(*(stub.CreateUser(create(labels=large)) for _ in range(100)))
    first = await _behind(service)
    assert first.value("tidings_feed_head") == 400
    assert first.value("tidings_feed_window_bytes") <= 1 << 20
    # It is sent nothing: what it lacks grows older, and more.
    await stub.CreateUser(create())
    second = await _behind(service, more_than=first.value("tidings_feed_subscriber_lag_events"))
    name = "tidings_feed_subscriber_lag_time_seconds"
    assert second.value(name, caller="") > first.value(name, caller="") > 0
    while (await read(stuck)).position < 401:
        pass
    await until(lambda: _caught_up(service))
    stuck.cancel()


async def _behind(service: ServiceProcess, more_than: float = 0) -> Scrape:
    async def there() -> Scrape | None:
        scraped = await scrape(service)
        behind = scraped.value("tidings_feed_subscriber_lag_events") if scraped.has("tidings_feed_subscribers") else 0.0
        return scraped if behind > more_than else None

    found: Scrape = await until(there)
    return found


async def _caught_up(service: ServiceProcess) -> bool:
    scraped = await scrape(service)
    names = ("tidings_feed_subscriber_lag_events", "tidings_feed_subscriber_lag_time_seconds")
    return all(scraped.has(name) and scraped.value(name) == 0 for name in names)


async def _without(service: ServiceProcess, name: str) -> bool:
    return not (await scrape(service)).has(name)


async def test_the_time_of_what_is_no_longer_in_memory(services: Services, users_database: Database) -> None:
    service = await services.users(users_database, segment_events=4, unsealed_events=3, seal_interval=0.1).start()
    stub = stub_of(service)
    for _ in range(11):
        await stub.CreateUser(create())
    await until(lambda: _sealed(users_database, 8))
    stream = stub.WatchUsers(Request(earliest={}))
    events = [event for _ in range(3) for event in (await read(stream)).events]
    stream.cancel()
    times = {event.position: event.commit_time.ToNanoseconds() / 1e9 for event in events}
    assert sorted(times) == list(range(1, 12))
    async with await database.connect(users_database.url, "test") as connection:
        found = await reads.commit_times(connection, [1, 3, 4, 5, 9, 11, 12])
    # Of a sealed one it is that of the first of its segment.
    expected = {1: 1, 3: 1, 4: 1, 5: 5, 9: 9, 11: 11}
    assert found == {position: pytest.approx(times[of], abs=1e-5) for position, of in expected.items()}


async def _sealed(made: Database, count: int) -> bool:
    [(sealed,)] = await made.fetch("SELECT coalesce(max(last_position), 0) FROM segments")
    return sealed == count
