"""Digests of the service as processes, behind a real user service: killed while they gather and close."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from functools import partial
from pathlib import Path

from tests.harness import Databases, MailCatcher, ServiceProcess, Services, scrape, until
from tests.notifications.conftest import write
from tests.notifications.digesting import RULES
from tests.users.calls import create, stub_of
from tidings.client import Digests, Notifications, connect
from tidings.notifications.v1 import digests_pb2, notifications_pb2
from tidings.users.v1 import users_pb2

_SAID = "{% for item in items %}[{{ item.user.username }} {{ item.user.version }}]{% endfor %}"
_USERS, _CHANGES = 6, 12


def files(path: Path) -> dict[str, object]:
    """Settings for digests that say of whom and of which version each item is."""
    folder = path / "templates"
    folder.mkdir()
    for name, said in (("gathered", _SAID), ("single", "one")):
        for part in ("subject.txt", "txt", "html"):
            write(folder / f"{name}.{part}", said)
    return {"rules_file": write(path / "rules.toml", RULES), "templates_dir": folder}


async def flush(process: ServiceProcess) -> int:
    """Closes what is open, unless another is about to for long; how many that were."""
    async with connect(process.address) as channel:
        digests = Digests(channel)
        opened = [one async for one in digests.list(state=digests_pb2.Digest.OPEN)]
        for one in opened:
            await digests.flush(one.id)
        return len(opened)


async def deliveries(process: ServiceProcess) -> list[notifications_pb2.Delivery]:
    async with connect(process.address) as channel:
        return [one async for one in Notifications(channel).deliveries()]


async def test_kills_lose_no_item_and_double_none(
    databases: Databases, services: Services, mail_catcher: MailCatcher, tmp_path: Path
) -> None:
    users = await services.users(await databases.users()).start()
    database = await databases.notifications()
    # Whoever dies while it closes or sends is stood in for soon.
    settings = files(tmp_path) | {"shards": 2, "metrics_address": "127.0.0.1:0"}
    settings |= {"send_timeout": 0.5, "lease": 1.0, "shard_lease": 1.0, "poll_interval": 0.2}
    replicas = [services.notifications(database, users, mail_catcher, **settings) for _ in range(2)]
    await asyncio.gather(*(one.start() for one in replicas))
    stub = stub_of(users)
    made = [await stub.CreateUser(create()) for _ in range(_USERS)]

    async def gathered() -> float:
        return sum([(await scrape(one)).value("tidings_digests_items_total") for one in replicas])

    async def change(user: users_pb2.User) -> None:
        for number in range(_CHANGES):
            changed = users_pb2.User(id=user.id, display_name=f"Name {number}")
            mask = {"paths": ["display_name"]}
            await stub.UpdateUser(users_pb2.UpdateUserRequest(user=changed, update_mask=mask))
            await asyncio.sleep(0.02)

    await stub.UpdateUser(
        users_pb2.UpdateUserRequest(
            user=users_pb2.User(id=made[0].id, display_name="First"), update_mask={"paths": ["display_name"]}
        )
    )
    await until(gathered)
    assert await gathered() == 1

    changing = asyncio.gather(*(change(user) for user in made))
    for replica in replicas:
        seen = len(mail_catcher.paths())
        await until(partial(lambda before: len(mail_catcher.paths()) > before or changing.done(), seen), poll=0.005)
        await replica.kill()
        await replica.restart()
    await changing

    async def is_gathered() -> bool:
        [[count]] = await database.fetch("SELECT count(*) FROM digest_items")
        return count == _USERS * _CHANGES + 1

    await until(is_gathered)

    async def is_mailed() -> bool:
        await flush(replicas[0])
        found = await deliveries(replicas[0])
        return all(one.state == notifications_pb2.Delivery.DELIVERED for one in found)

    await until(is_mailed)
    mails = {one.message_id: one for one in mail_catcher.messages()}
    assert len(mails) == len(await deliveries(replicas[0]))
    told = Counter(item for one in mails.values() for item in re.findall(r"\[(\S+ \d+)\]", str(one.message["Subject"])))
    wanted = Counter(f"{user.username} {2 + number}" for user in made for number in range(_CHANGES))
    assert told == wanted + Counter([f"{made[0].username} {2 + _CHANGES}"])
    assert max(str(one.message["Subject"]).count("[") for one in mails.values()) == 3
