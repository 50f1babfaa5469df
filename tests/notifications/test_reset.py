"""A feed that cannot be followed is said, and an operator lets the service go on: real services and mail."""

from __future__ import annotations

import argparse
import uuid
from collections import Counter
from dataclasses import replace

import pytest

from notification_service import reset
from notification_service.domain import Cursor
from tests.harness import Database, Databases, MailCatcher, ServiceProcess, Services, until
from tests.servicekit.probes import check
from tests.users.calls import create, stub_of
from tidings.users.v1 import users_pb2


async def _run(services: Services, database: Database, users: ServiceProcess, *arguments: str) -> tuple[int, str]:
    """`reset-cursor` with an input that is empty."""
    environment = {
        "TIDINGS_NOTIFICATIONS_DATABASE_URL": database.url,
        "TIDINGS_NOTIFICATIONS_USERS_ADDRESS": users.address,
    }
    process = services.process("notification_service", "reset-cursor", *arguments, environment=environment)
    await process.launch()
    return await process.wait(), "\n".join(process.lines)


async def _positions(database: Database) -> tuple[int, int]:
    """Of the cursor and of the newest notification."""
    [[position, notification]] = await database.fetch(
        "SELECT CASE resume_token WHEN 'divided' THEN (SELECT min(position) FROM shards) ELSE position END,"
        " notification_position FROM inbox"
    )
    return int(str(position)), int(str(notification))


async def _processed(database: Database, users: ServiceProcess) -> None:
    async def done() -> bool:
        head = (await stub_of(users).GetFeed(users_pb2.GetFeedRequest())).head_position
        return (await _positions(database))[0] == head

    await until(done, 60, "every change is processed")


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_feed_that_refuses_the_cursor(
    databases: Databases, services: Services, mail_catcher: MailCatcher, shards: int
) -> None:
    settings = {"shards": shards, "shard_lease": 1, "feed_bookmark_interval": 1}
    first = await services.users(await databases.users()).start()
    second = await services.users(await databases.users()).start()
    database = await databases.notifications()
    service = await services.notifications(database, first, mail_catcher, **settings).start()
    for _ in range(3):
        await stub_of(first).CreateUser(create())
    await _processed(database, first)
    assert await service.stop() == 0

    # The same service, at another user service's feed.
    for _ in range(2):
        await stub_of(second).CreateUser(create())
    service = services.notifications(database, second, mail_catcher, **settings)
    await service.launch()
    said = await service.wait_log("the user feed cannot be followed")
    assert "reset-cursor" in said["do"]
    await service.wait_serving()

    async def refused() -> bool:
        status, told = await check(service.address, "readiness")
        return (status, told.get("tidings-reason")) == (
            "NOT_SERVING", "the user feed cannot be followed: FOREIGN_TOKEN"
        )  # fmt: skip

    await until(refused)
    assert (await check(service.address, "liveness"))[0] == "SERVING"

    code, output = await _run(services, database, second, "--to", "earliest")
    assert code == 1
    assert "That is another log." in output
    assert "error: nothing is changed" in output
    assert await _positions(database) == (3, 3)
    code, output = await _run(services, database, second, "--to", "earliest", "--yes")
    assert (code, output.splitlines()[-1].split(";")[0]) == (0, "the cursor is at position 0")
    await until(service.is_ready)
    await _processed(database, second)
    assert await _positions(database) == (2, 5)

    # Again, while it follows the feed: it goes on there, and nothing is told twice.
    code, output = await _run(services, database, second, "--to", "earliest", "--yes")
    assert code == 0
    assert "Changes 1 to 2 are processed again." in output
    await stub_of(second).CreateUser(create())
    await _processed(database, second)
    assert await _positions(database) == (3, 6)
    mails = await mail_catcher.wait(6)
    assert set(Counter(one.message_id for one in mails).values()) == {1}
    assert len(mails) == 6


async def test_what_is_passed_over_makes_nothing(
    databases: Databases, services: Services, mail_catcher: MailCatcher
) -> None:
    users = await services.users(await databases.users()).start()
    database = await databases.notifications()
    for _ in range(3):
        made = await stub_of(users).CreateUser(create())
    code, output = await _run(services, database, users, "--to", "now", "--yes")
    assert code == 0, output
    assert "There is no cursor; it would be at position 3" in output
    service = await services.notifications(database, users, mail_catcher).start()
    await stub_of(users).CreateUser(create())
    await _processed(database, users)
    assert await _positions(database) == (4, 1)
    await service.stop()
    code, output = await _run(services, database, users, "--to", made.create_time.ToJsonString(), "--yes")
    assert "the cursor is at position 2" in output
    code, output = await _run(services, database, users, "--to", "now", "--yes")
    assert "Changes 3 to 4 make no notifications here" in output
    await users.stop()
    code, output = await _run(services, database, users, "--to", "now", "--yes")
    assert code == 1
    assert "error: the user service " in output


def test_effects() -> None:
    here = Cursor(uuid.uuid4(), "token", 5, 0, 0)
    for after, words in (
        (here, "No change is processed again, and none is left out."),
        (replace(here, position=3), "Changes 4 to 5 are processed again."),
        (replace(here, position=9), "Changes 6 to 9 make no notifications"),
        (replace(here, log_id=uuid.uuid4()), "That is another log."),
    ):
        assert words in reset.effects(here, after)[1]


@pytest.mark.parametrize("text", ["yesterday", "17", "2026-01-31T12:00:00", ""])
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be earliest"):
        reset.start(text)
