"""Fixtures of all tests. The Postgres server is one per session; everything else belongs to one test."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.harness import (
    Collector,
    Database,
    Databases,
    MailCatcher,
    PostgresProxy,
    PostgresServer,
    Services,
    programs,
)
from tests.harness.collector import collecting

# What is started in a shell's background ignores SIGINT, and so would the processes of the tests, which are sent it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("tidings", deadline=None)
hypothesis.settings.load_profile("tidings")


@pytest.fixture(scope="session", autouse=True)
async def _programs() -> AsyncIterator[None]:
    """Ends what the session's processes were forked from."""
    yield
    programs.stop()


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[PostgresServer]:
    """The session's Postgres."""
    server = await PostgresServer.start()
    yield server
    await server.stop()


@pytest.fixture
async def databases(postgres: PostgresServer) -> AsyncIterator[Databases]:
    """Makes as many fresh databases as the test asks for."""
    made = Databases(postgres)
    yield made
    await made.drop()


@pytest.fixture
async def users_database(databases: Databases) -> Database:
    """A fresh users database at the newest revision."""
    return await databases.users()


@pytest.fixture
async def notifications_database(databases: Databases) -> Database:
    """A fresh notifications database at the newest revision."""
    return await databases.notifications()


@pytest.fixture
async def services(databases: Databases) -> AsyncIterator[Services]:
    """Starts services. It leans on `databases` so that services end before their databases do."""
    started = Services()
    yield started
    await started.stop()


@pytest.fixture
async def proxy(postgres: PostgresServer) -> AsyncIterator[PostgresProxy]:
    """A proxy before the session's Postgres that breaks connections."""
    async with PostgresProxy(postgres.server.socket_dir) as opened:
        yield opened


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets, which a Postgres of another user may reach."""
    directory = Path(tempfile.mkdtemp(prefix="tidings-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def mail_catcher(short_dir: Path) -> AsyncIterator[MailCatcher]:
    """A running mail catcher."""
    catcher = await MailCatcher(short_dir).start()
    yield catcher
    await catcher.stop()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """An OpenTelemetry collector that listens."""
    async with collecting() as made:
        yield made
