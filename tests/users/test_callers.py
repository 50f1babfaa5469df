"""Callers of a running user service: who gets in, whose name events bear, and what one caller may take from others."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from servicekit.settings import InvalidSettingsError, load
from tests.harness import Callers, Database, ServiceProcess, Services, until
from tests.users.calls import Stub, create, read, refusal, refused, replay
from tidings.client import ApiError, Users, connect
from tidings.users.v1 import users_pb2
from user_service.settings import UserServiceSettings
from user_service.writer import APPLICATION

Request = users_pb2.WatchUsersRequest
StubOf = Callable[..., Stub]


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    """A file of callers."""
    return Callers(tmp_path / "callers.toml")


def stub_for(service: ServiceProcess, token: str | None = None) -> Stub:
    """A stub of one caller, on a channel of its own."""
    return Stub(connect(service.address, token=token))


async def test_who_has_no_token_or_may_not_is_refused(
    callers: Callers, users_database: Database, services: Services
) -> None:
    reader, admin = callers.add("reader", "WatchUsers", "Get*"), callers.add("admin")
    service = await services.users(users_database, callers_file=callers.path).start()

    said = await refused(stub_for(service).CreateUser(create()))
    assert (said.code, said.reason) == (grpc.StatusCode.UNAUTHENTICATED, "MISSING_TOKEN")
    said = await refused(stub_for(service).WatchUsers(Request(earliest={})).read())
    assert (said.code, said.reason) == (grpc.StatusCode.UNAUTHENTICATED, "MISSING_TOKEN")
    said = await refused(stub_for(service, "guessed").GetFeed(users_pb2.GetFeedRequest()))
    assert (said.code, said.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNKNOWN_TOKEN")
    said = await refused(stub_for(service, reader).CreateUser(create()))
    assert (said.code, said.reason) == (grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
    assert said.metadata == {"method": "tidings.users.v1.UserService/CreateUser", "caller": "reader"}

    made = await stub_for(service, admin).CreateUser(create())
    [event] = await replay(stub_for(service, reader))
    assert (event.user.id, event.actor) == (made.id, "admin")

    # Probes have no tokens; what reflection tells is for callers.
    async with connect(service.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="readiness"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    for token, code in ((None, "UNAUTHENTICATED"), (reader, "PERMISSION_DENIED"), (admin, None)):
        async with connect(service.address, token=token) as channel:
            assert await _reflected(channel) == code


async def _reflected(channel: grpc.aio.Channel) -> str | None:
    """What reflection is refused with; None if it tells of the user service."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    stream = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    try:
        listed = await stream.read()
    except grpc.aio.AioRpcError as error:
        return error.code().name
    assert "tidings.users.v1.UserService" in [one.name for one in listed.list_services_response.service]
    return None


async def test_callers_with_one_request_id_do_not_meet_and_metadata_names_nobody(
    callers: Callers, users_database: Database, services: Services
) -> None:
    crm, billing = callers.add("crm"), callers.add("billing")
    service = await services.users(users_database, callers_file=callers.path).start()
    request_id = str(uuid.uuid4())
    pretence = tuple((key, "billing") for key in ("actor", "caller", "x-actor", "x-forwarded-user", "name"))

    first = create(request_id)
    made = await stub_for(service, crm).CreateUser(first, metadata=(*pretence, ("authorization2", f"Bearer {billing}")))
    other = await stub_for(service, billing).CreateUser(create(request_id))
    assert other.id != made.id
    assert await stub_for(service, crm).CreateUser(first) == made
    said = await refused(stub_for(service, billing).CreateUser(first))
    assert said.reason == "REQUEST_ID_REUSED"
    events = await replay(stub_for(service, crm))
    assert [(event.user.id, event.actor) for event in events] == [(made.id, "crm"), (other.id, "billing")]


async def test_a_token_is_added_and_taken_back_while_streams_are_open(
    callers: Callers, users_database: Database, services: Services
) -> None:
    old = callers.add("crm")
    service = await services.users(users_database, callers_file=callers.path).start()
    stream = stub_for(service, old).WatchUsers(Request(now={}))
    await read(stream)

    async def is_known(token: str) -> bool:
        async with connect(service.address, token=token) as channel:
            try:
                await Users(channel).feed()
            except ApiError as error:
                return error.reason != "UNKNOWN_TOKEN"
            return True

    new = callers.add("crm")
    await until(lambda: is_known(new))
    assert await is_known(old)
    callers.remove(old)

    async def is_over() -> bool:
        return not await is_known(old)

    await until(is_over)
    callers.break_off()
    await service.wait_log("a changed file cannot be used; what was read before stays")
    made = await stub_for(service, new).CreateUser(create())
    while not (message := await read(stream)).events:
        pass
    assert message.events[0].user.id == made.id
    assert await service.is_ready()
    stream.cancel()


async def test_a_caller_takes_no_streams_from_others(
    callers: Callers, users_database: Database, services: Services
) -> None:
    greedy, modest = callers.add("greedy"), callers.add("modest")
    settings: dict[str, object] = {"callers_file": callers.path, "max_streams": 4, "max_streams_per_caller": 2}
    service = await services.users(users_database, **settings).start()
    streams = [stub_for(service, greedy).WatchUsers(Request(now={})) for _ in range(2)]
    for stream in streams:
        await read(stream)
    # Another token of the same caller is the same caller.
    second = callers.add("greedy")
    await service.wait_log("a changed file is used")
    for token in (greedy, second):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_for(service, token).WatchUsers(Request(now={})).read()
        said = refusal(caught.value)
        assert (said.code, said.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert said.metadata == {"limit": "2", "caller": "greedy"}
    streams.append(stub_for(service, modest).WatchUsers(Request(now={})))
    await read(streams[-1])
    for stream in streams:
        stream.cancel()


async def test_a_caller_does_not_fill_the_queue_for_others(
    callers: Callers, users_database: Database, services: Services
) -> None:
    greedy, modest = callers.add("greedy"), callers.add("modest")
    service = await services.users(users_database, callers_file=callers.path, queue_limit_per_caller=3).start()
    stub = stub_for(service, greedy)

    async def call(of: Stub) -> users_pb2.User:
        return await of.CreateUser(create())

    async def is_blocked() -> bool:
        return bool(
            await users_database.fetch(
                "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'", APPLICATION
            )
        )

    async with await users_database.connect() as holder, holder.transaction():
        await holder.execute("SELECT 1 FROM feed FOR UPDATE")
        committing = asyncio.create_task(call(stub))
        await until(is_blocked)
        waiting = [asyncio.create_task(call(stub)) for _ in range(4)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        [one] = done
        said = await refused(one)
        assert (said.code, said.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WRITE_QUEUE_FULL")
        assert said.metadata == {"limit": "3", "caller": "greedy"}
        other = asyncio.create_task(call(stub_for(service, modest)))
    await asyncio.gather(committing, other, *(task for task in waiting if task is not one))
    # What was taken from the queue no longer counts.
    for _ in range(5):
        await call(stub)
    actors = [event.actor for event in await replay(stub)]
    assert sorted(actors) == ["greedy"] * 9 + ["modest"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"listen": "0.0.0.0:0"},
            "TIDINGS_USERS_LISTEN: other machines reach 0.0.0.0:0: set TIDINGS_USERS_CALLERS_FILE",
        ),
        ({"listen": "[::]:0"}, "TIDINGS_USERS_CALLERS_FILE"),
        ({"listen": "0.0.0.0:0", "encrypted_elsewhere": "true"}, "TIDINGS_USERS_CALLERS_FILE"),
        ({"listen": "0.0.0.0:0", "tls_certificate_file": "F", "tls_key_file": "F"}, "TIDINGS_USERS_CALLERS_FILE"),
        (
            {"listen": "0.0.0.0:0", "callers_file": "F"},
            "_FILE and TIDINGS_USERS_TLS_KEY_FILE, or TIDINGS_USERS_ENCRYPTED_ELSEWHERE=true",
        ),
        ({"tls_key_file": "F"}, "TIDINGS_USERS_TLS_CERTIFICATE_FILE, TIDINGS_USERS_TLS_KEY_FILE: set both"),
        ({"tls_client_ca_file": "F"}, "TIDINGS_USERS_TLS_CLIENT_CA_FILE: needs "),
        ({"callers_file": "missing"}, "TIDINGS_USERS_CALLERS_FILE: "),
    ],
)
def test_settings_that_would_let_anybody_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str
) -> None:
    (tmp_path / "F").touch()
    monkeypatch.chdir(tmp_path)
    for name, value in {"database_url": "postgresql://", **settings}.items():
        monkeypatch.setenv(f"TIDINGS_USERS_{name.upper()}", value)
    with pytest.raises(InvalidSettingsError) as caught:
        load(UserServiceSettings)
    [line] = str(caught.value).splitlines()
    assert says in line


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix:/tmp/socket"])
def test_this_machine_alone_needs_no_tokens(listen: str) -> None:
    assert load(UserServiceSettings, database_url="postgresql://", listen=listen, callers_file="").callers_file is None


def test_a_mesh_may_encrypt_what_is_listened_to_everywhere(callers: Callers) -> None:
    callers.add("crm")
    settings = {"listen": "0.0.0.0:0", "callers_file": callers.path, "encrypted_elsewhere": True}
    assert load(UserServiceSettings, database_url="postgresql://", **settings).listen == "0.0.0.0:0"


async def test_a_unix_socket_is_served_without_tokens(
    users_database: Database, services: Services, short_dir: Path
) -> None:
    service = await services.users(users_database, listen=f"unix:{short_dir}/socket").start()
    assert service.address == f"unix:{short_dir}/socket"
    async with connect(service.address, token="any") as channel:
        assert (await Users(channel).feed()).head_position == 0


async def test_a_refused_start_ends_with_2(callers: Callers, services: Services) -> None:
    unsafe = services.users("postgresql://", listen="0.0.0.0:0")
    callers.add("crm", "DropUsers")
    unknown = services.users("postgresql://", callers_file=callers.path)
    for process, says in ((unsafe, "error: TIDINGS_USERS_LISTEN: "), (unknown, "error: ")):
        await process.launch()
        assert await process.wait() == 2
        [line] = process.lines
        assert line.startswith(says)
    assert f"{callers.path}: caller 'crm': methods: no 'DropUsers' here" in unknown.lines[0]
