"""A running user service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.harness import Database, PostgresServer, ServiceProcess, Services
from tests.users.calls import Log, Stub, read
from tidings.users.v1 import users_pb2


@pytest.fixture
async def service(services: Services, users_database: Database) -> ServiceProcess:
    """A ready user service on a fresh database."""
    return await services.users(users_database).start()


@pytest.fixture
async def stub(service: ServiceProcess) -> AsyncIterator[Stub]:
    """A stub of that service."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield Stub(channel)


@pytest.fixture(scope="module")
async def shared_database(postgres: PostgresServer) -> AsyncIterator[Database]:
    """A users database for a whole module, whose tests only count what they have added."""
    made = await postgres.users_database()
    yield made
    await postgres.drop(made)


@pytest.fixture(scope="module")
async def shared_stub(shared_database: Database) -> AsyncIterator[Stub]:
    """A stub of a user service for a whole module: starting one takes longer than most tests."""
    services = Services()
    service = await services.users(shared_database).start()
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield Stub(channel)
    await services.stop()


@pytest.fixture
async def log(shared_stub: Stub) -> Log:
    """The feed of that service from here on."""
    stream = shared_stub.WatchUsers(users_pb2.WatchUsersRequest(now={}))
    start = await read(stream)
    stream.cancel()
    return Log(shared_stub, start.resume_token, start.position)
