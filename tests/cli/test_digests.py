"""`digests` against the real service's methods, on a real Postgres."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from notification_service.api.digests import DigestService
from servicekit import callers, database, guard
from tests.cli.conftest import System, Tidings
from tests.harness import Database
from tests.notifications.conftest import Events
from tests.notifications.digesting import Site, compose_of, renamed
from tidings.notifications.v1 import digests_pb2_grpc


@pytest.fixture
async def gathered(system: System, notifications_database: Database, tmp_path: Path) -> AsyncIterator[Site]:
    """The service in place of what answers for the other commands."""
    async with database.pool(notifications_database.url, "tests", size=4) as pool, pool.connection() as connection:
        site = Site(compose_of(tmp_path), pool, connection)
        server = grpc.aio.server()
        add = digests_pb2_grpc.add_DigestServiceServicer_to_server
        guard.add(server, callers.anyone, add, DigestService(pool, site.digester().flush))
        system.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        yield site
        await server.stop(None)


async def test_digests(gathered: Site, tidings: Tidings) -> None:
    events = Events()
    ada, bob = events.user("ada"), events.user("bob")
    await gathered.store(renamed(events, ada), renamed(events, ada), renamed(events, bob))
    ran = await tidings("digests", "list", "--state", "open")
    assert (ran.code, ran.err) == (0, "")
    found = [line.split()[4:] for line in ran.out.splitlines()[1:]]
    assert [one[:5] for one in found] == [
        ["hourly", "open", "1", bob.id, "bob@example.com"], ["hourly", "open", "2", ada.id, "ada@example.com"]
    ]  # fmt: skip
    of_bob, of_ada = (one[5] for one in found)

    shown = json.loads((await tidings("digests", "show", of_ada, "--json")).out)
    ran = await tidings("digests", "show", of_ada)
    assert [line.split()[1] for line in ran.out.splitlines() if line.startswith("item")] == (
        shown["item_notification_ids"]
    )
    ran = await tidings("digests", "flush", of_ada)
    assert (ran.code, "closed" in ran.out, "became" in ran.out) == (0, True, True)
    assert (await tidings("digests", "flush", of_ada)).out == ran.out
    item = shown["item_notification_ids"][0]
    ran = await tidings("digests", "list", "--notification", item, "--name", "hourly", "--user", ada.id, "--json")
    assert [json.loads(line)["state"] for line in ran.out.splitlines()] == ["CLOSED"]

    await gathered.store(events.deleted(bob))
    for arguments, code, message in (
        (("flush", of_bob), 5, f"digest {of_bob} is cancelled: USER_DELETED"),
        (("show", item), 4, f"no digest {item}"),
        (("show", "daily"), 3, "id: must be a UUID"),
        (("list", "--user", "ada"), 3, "filter.user_id: must be a UUID"),
    ):
        ran = await tidings("digests", *arguments)
        assert (ran.code, message in ran.err) == (code, True), ran
