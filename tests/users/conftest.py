"""A running user service."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.harness import Database, ServiceProcess, Services
from tests.users.calls import Stub


@pytest.fixture
async def service(services: Services, users_database: Database) -> ServiceProcess:
    """A ready user service on a fresh database."""
    return await services.users(users_database).start()


@pytest.fixture
async def stub(service: ServiceProcess) -> AsyncIterator[Stub]:
    """A stub of that service."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield Stub(channel)
