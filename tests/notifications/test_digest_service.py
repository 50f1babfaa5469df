"""DigestService over a socket, and what the rules file may say of digests."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from notification_service import categories, domain, rules
from notification_service.api.digests import DigestService
from notification_service.api.templates import TemplateService
from notification_service.channels.email import EmailChannel
from notification_service.store import digests
from servicekit import callers, guard
from servicekit.configfile import InvalidConfigError
from tests.notifications.conftest import SENDER, Events, write
from tests.notifications.digesting import RULES, Site, compose_of, renamed
from tidings.client import ApiError, Digests
from tidings.notifications.v1 import digests_pb2, digests_pb2_grpc, templates_pb2


@pytest.fixture
async def api(site: Site) -> AsyncIterator[Digests]:
    server = grpc.aio.server()
    guard.add(
        server,
        callers.anyone,
        digests_pb2_grpc.add_DigestServiceServicer_to_server,
        DigestService(site.pool, site.digester().flush),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Digests(channel)
    await server.stop(None)


async def test_lists(site: Site, events: Events, api: Digests) -> None:
    users = [events.user(f"user{number}") for number in range(5)]
    made = [renamed(events, user) for user in users]
    await site.store(*made)
    [closing] = [one async for one in api.list(user_id=users[0].id)]
    await api.flush(closing.id)

    async def listed(**filters: Any) -> list[str]:
        return [one.target async for one in api.list(**filters, page_size=2)]

    everybody = [f"user{number}@example.com" for number in reversed(range(5))]
    assert await listed() == await listed(name="hourly") == everybody
    assert await listed(name="daily") == []
    assert await listed(state=digests_pb2.Digest.OPEN) == everybody[:-1]
    assert await listed(state=digests_pb2.Digest.CLOSED) == everybody[-1:]
    item = domain.notification_id(uuid.UUID(made[0].id), "renamed")
    assert await listed(notification_id=str(item)) == everybody[-1:]
    [closed] = [one async for one in api.list(user_id=users[0].id)]
    assert await listed(notification_id=closed.notification_id) == everybody[-1:]
    assert closed == await api.get(closed.id)
    for wrong, field in (
        ({"user_id": "ada"}, "filter.user_id"),
        ({"state": 9}, "filter.state"),
        ({"name": "a\0"}, "filter.name"),
    ):
        with pytest.raises(ApiError) as refused:
            await listed(**wrong)
        assert [one.field for one in refused.value.violations] == [field]


async def test_a_flush_closes_at_once_and_may_be_repeated(site: Site, events: Events, api: Digests) -> None:
    ada, bob = events.user("ada"), events.user("bob")
    await site.store(renamed(events, ada), renamed(events, bob))
    of_bob, of_ada = await site.digests()
    closed = await api.flush(of_ada.id)
    assert closed.state == digests_pb2.Digest.CLOSED
    assert closed.notification_id
    assert await api.flush(of_ada.id) == closed
    assert len(await site.deliveries()) == 1
    await site.store(events.deleted(bob))
    for call, identity, reason in (
        (api.flush, of_bob.id, "DIGEST_CANCELLED"),
        (api.flush, str(uuid.uuid4()), "UNKNOWN_DIGEST"),
        (api.get, str(uuid.uuid4()), "UNKNOWN_DIGEST"),
        (api.get, "", "INVALID_FIELD"),
        (api.flush, "daily", "INVALID_FIELD"),
    ):
        with pytest.raises(ApiError) as refused:
            await call(identity)
        assert refused.value.reason == reason


async def test_a_flush_waits_for_who_is_closing_it(site: Site, events: Events, api: Digests) -> None:
    await site.store(renamed(events, events.user("ada")))
    [opened] = await site.digests()
    async with site.pool.connection() as connection:
        # Whoever has taken it dies of that.
        assert await digests.flush(connection, uuid.UUID(opened.id), lease=0.5)
    assert (await api.flush(opened.id)).state == digests_pb2.Digest.CLOSED
    assert len(await site.deliveries()) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('window = "1h"', 'window = "30s"', "window: Value error, must be a duration of 1 minute to 7 days, such as"),
        ('window = "1h"', 'window = "8d"', "window: Value error, must be a duration"),
        ('window = "1h"', "window = 60", "window: Value error, must be a duration"),
        ('window = "1h"', 'at = "8:00"', 'at: Value error, must be a local time such as "08:00"'),
        ('window = "1h"', "", "window or at is required"),
        ("most = 3", "most = 1001", "most: Input should be less than or equal to 1000"),
        ('name = "hourly"', 'name = "daily"', "rule 'renamed': digest: there is no digest 'hourly'"),
        (
            'category = "social"\ntemplate = "gathered"',
            'category = "news"\ntemplate = "gathered"',
            "rule 'renamed': digest: 'hourly' is of category 'news', the rule of 'social'",
        ),
        ('channels = ["email", "in_app"]', 'channels = ["in_app"]', "digest: gathers mails, but email is none of"),
        ("[[digests]]", "[[digest]]", "has [[rules]] and [[digests]] tables and nothing else, but found: digest"),
    ],
)
def test_wrong_rules_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert RULES.count(old)
    with pytest.raises(InvalidConfigError) as refused:
        rules.read(write(tmp_path / "rules.toml", RULES.replace(old, new, 1)))
    assert message in str(refused.value)


def test_a_digest_needs_its_template(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError) as refused:
        compose_of(tmp_path, RULES.replace('template = "gathered"', 'template = "absent"'))
    assert str(refused.value) == "rule 'digest:hourly': template absent.subject.txt is missing"


async def test_the_templates_of_digests_are_listed_and_tried(tmp_path: Path) -> None:
    composer = compose_of(tmp_path)
    service = TemplateService(
        composer, EmailChannel("127.0.0.1", 1, sender=SENDER, timeout=5.0), SENDER, send_timeout=5
    )
    context = cast("grpc.aio.ServicerContext[Any, Any]", None)
    listed = await service.ListTemplates(templates_pb2.ListTemplatesRequest(), context)
    assert {one.name: list(one.rules) for one in listed.templates if one.rules} == {
        "gathered": ["digest:hourly"],
        "single": ["renamed", "moved", "gone"],
    }
    said = await service.PreviewTemplate(templates_pb2.PreviewTemplateRequest(template="gathered"), context)
    assert (said.subject, said.text.count("Ada Lovelace|The ")) == ("2 changes", 2)


def test_what_is_mandatory_is_not_gathered(tmp_path: Path) -> None:
    told = rules.read(write(tmp_path / "rules.toml", RULES))
    file = write(tmp_path / "c.toml", '[[categories]]\nname = "social"\nmandatory = true\n')
    with pytest.raises(InvalidConfigError) as refused:
        categories.check_digests(categories.load(file), told.digests.values())
    assert str(refused.value).startswith("digest 'hourly': category 'social' is mandatory")
    categories.check_digests(categories.load(None), told.digests.values())


def test_the_example_in_the_default_rules_is_one(tmp_path: Path) -> None:
    lines = rules.DEFAULT_FILE.read_text().splitlines()
    example = [line.removeprefix("# ") for line in lines[lines.index("# [[digests]]") :]]
    told = rules.read(write(tmp_path / "rules.toml", "\n".join(line.removeprefix("#") for line in example)))
    assert [rule.digest for rule in told.rules] == list(told.digests) == ["daily"]
