"""Sends by real processes: a user who was just created, a kill in the middle, several replicas, a webhook."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from tests.harness import Database, Databases, MailCatcher, ServiceProcess, Services, until
from tests.notifications.conftest import write
from tests.users.calls import create, stub_of
from tidings.client import Sends, connect
from tidings.notifications.v1 import sends_pb2 as pb
from tidings.users.v1 import users_pb2

COUNT = 2000
# Nothing but sends makes notifications.
RULES = '[[rules]]\nname="gone"\non=["UNDELETED"]\ntemplate="news"\ncategory="c"\nchannels=["in_app"]\n'


@pytest.fixture
def files(tmp_path: Path) -> dict[str, object]:
    """Settings that name the operator's files."""
    templates = tmp_path / "templates"
    templates.mkdir()
    write(templates / "news.subject.txt", "News for {{ name }}")
    write(templates / "news.txt", "{{ params.what }}")
    write(templates / "news.html", "<p>{{ params.what }}</p>")
    return {"templates_dir": templates, "rules_file": write(tmp_path / "rules.toml", RULES), "poll_interval": 0.2}


def news(*ids: str, channel: str = "in_app") -> pb.Send:
    to = pb.Send.Recipients(user_ids={"ids": ids}) if ids else pb.Send.Recipients(filter={"all": True})
    return pb.Send(template="news", category="news", channels=[channel], params={"what": "Rain"}, recipients=to)


async def ended(process: ServiceProcess, send_id: str) -> pb.Send:
    async with connect(process.address) as channel:
        async for send in Sends(channel).watch(send_id, every=0.05):
            last = send
    return last


async def made(database: Database) -> int:
    [[count]] = await database.fetch("SELECT count(*) FROM notifications")
    assert isinstance(count, int)
    return count


async def test_killed_in_the_middle_each_recipient_has_one_notification(
    databases: Databases, services: Services, files: dict[str, object]
) -> None:
    users = await services.users(await databases.users()).start()
    stub = stub_of(users)
    for _ in range(COUNT // 1000):
        await stub.BatchCreateUsers(users_pb2.BatchCreateUsersRequest(requests=[create() for _ in range(1000)]))
    database = await databases.notifications()
    settings = {**files, "shard_lease": 1}
    first, second = [services.notifications(database, users, **settings) for _ in range(2)]
    await asyncio.gather(first.start(), second.start())
    async with connect(first.address) as channel:
        sent = await Sends(channel).create(news())
    # They take turns; then one is alone, then neither is there.
    await until(lambda: _reached(database, 300), poll=0.01)
    await first.kill()
    await until(lambda: _reached(database, 900), poll=0.01)
    await second.kill()
    assert await made(database) < COUNT
    await first.restart()
    done = await ended(first, sent.id)
    assert (done.state, done.counts) == (pb.Send.SENT, pb.Send.Counts(matched=COUNT, made=COUNT))
    [found] = await database.fetch(
        "SELECT count(*), count(DISTINCT user_id), min(position), max(position), count(DISTINCT position)"
        " FROM notifications WHERE send_id = %s",
        sent.id,
    )
    assert found == (COUNT, COUNT, 1, COUNT, COUNT)
    [[counted]] = await database.fetch("SELECT notification_position FROM inbox")
    assert counted == COUNT


async def _reached(database: Database, count: int) -> bool:
    return await made(database) >= count


async def test_a_user_created_just_before_the_call_is_told_by_mail(
    databases: Databases, services: Services, mail_catcher: MailCatcher, files: dict[str, object]
) -> None:
    users = await services.users(await databases.users()).start()
    database = await databases.notifications()
    replicas = [services.notifications(database, users, mail_catcher, **files) for _ in range(2)]
    await asyncio.gather(*(one.start() for one in replicas))
    stub = stub_of(users)
    sent = []
    for process in replicas * 2:
        async with connect(process.address) as channel:
            user = await stub.CreateUser(create())
            key = str(uuid.uuid4())
            sends = [await Sends(channel).create(news(user.id, channel="email"), request_id=key) for _ in range(2)]
            assert sends[0].id == sends[1].id
            sent.append((user.email, await ended(process, sends[0].id)))
    assert {(one.state, one.counts.made) for _, one in sent} == {(pb.Send.SENT, 1)}
    mails = await mail_catcher.wait(4)
    assert sorted(one.recipients[0] for one in mails) == sorted(email for email, _ in sent)
    # Nobody who is deleted is sent to, also at once after the deletion.
    gone = await stub.DeleteUser(users_pb2.DeleteUserRequest(id=(await stub.CreateUser(create())).id))
    async with connect(replicas[0].address) as channel:
        done = await ended(replicas[0], (await Sends(channel).create(news(gone.id, channel="email"))).id)
    assert done.counts == pb.Send.Counts(matched=1, deleted=1)
    for one in replicas:
        assert await one.stop() == 0
