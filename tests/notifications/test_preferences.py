"""PreferenceService over a real gRPC connection, on a real Postgres."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from notification_service import categories
from notification_service.api.preferences import PreferenceService
from notification_service.store import preferences as store
from servicekit import callers, guard
from servicekit.database import Connection, Pool
from tests.harness import Database, Services
from tests.notifications.conftest import write
from tidings.client import ApiError, Preferences
from tidings.notifications.v1 import preferences_pb2 as pb
from tidings.notifications.v1 import preferences_pb2_grpc

USER = str(uuid.uuid4())
HOURS = pb.Preferences.QuietHours(start="22:00", end="07:00", weekdays=[5, 1], time_zone="Europe/Berlin")
_FILE = """
[[categories]]
name = "security"
mandatory = true
[[categories]]
name = "news"
quiet_hours = false
off = ["webhook", "email"]
[[categories]]
name = "*"
off = ["in_app"]
"""


@pytest.fixture
async def client(pool: Pool, tmp_path: Path) -> AsyncIterator[Preferences]:
    server = grpc.aio.server()
    guard.add(
        server,
        callers.anyone,
        preferences_pb2_grpc.add_PreferenceServiceServicer_to_server,
        PreferenceService(pool, categories.load(write(tmp_path / "categories.toml", _FILE))),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Preferences(channel)
    await server.stop(1.0)


def wanted(version: int = 0, **fields: Any) -> pb.Preferences:
    categories = fields.pop("categories", {})
    made = pb.Preferences(user_id=USER, version=version, **fields)
    for name, choices in categories.items():
        made.categories[name].channels.update(choices)
    return made


def applies(found: pb.Preferences) -> dict[tuple[str, str], tuple[bool, str, bool]]:
    source = pb.Preferences.Effective.Source
    return {(one.category, one.channel): (one.on, source.Name(one.source), one.quiet_hours) for one in found.effective}


async def test_who_decided_nothing_has_the_defaults(client: Preferences) -> None:
    found = await client.get(USER)
    assert (found.version, found.HasField("update_time"), found.HasField("quiet_hours")) == (0, False, False)
    assert applies(found) == {
        ("news", "email"): (False, "DEFAULT", False),
        ("news", "in_app"): (True, "DEFAULT", False),
        ("news", "webhook"): (False, "DEFAULT", False),
        ("security", "email"): (True, "MANDATORY", False),
        ("security", "in_app"): (True, "MANDATORY", False),
        ("security", "webhook"): (True, "MANDATORY", False),
        ("*", "email"): (True, "DEFAULT", False),
        ("*", "in_app"): (False, "DEFAULT", False),
        ("*", "webhook"): (True, "DEFAULT", False),
    }


async def test_what_applies_and_why(client: Preferences, connection: Connection) -> None:
    await client.update(
        wanted(
            channels={"webhook": False, "email": True},
            categories={"account": {"email": False}, "other": {"webhook": True, "email": True}},
            quiet_hours=HOURS,
        ),
        ["channels", "categories", "quiet_hours"],
    )
    found = await client.get(USER)
    assert (found.version, dict(found.channels)) == (1, {"webhook": False, "email": True})
    assert list(found.quiet_hours.weekdays) == [1, 5]
    assert (found.quiet_hours.start, found.quiet_hours.end) == ("22:00", "07:00")
    said = applies(found)
    assert said["account", "email"] == (False, "CATEGORY", False)
    assert said["account", "webhook"] == (False, "CHANNEL", False)
    assert said["other", "webhook"] == (True, "CATEGORY", False)
    assert said["other", "email"] == (True, "CATEGORY", True)
    assert said["news", "email"] == (True, "CHANNEL", False)
    assert said["security", "email"] == (True, "MANDATORY", False)
    # What the gate reads.
    stored = await store.find(connection, uuid.UUID(USER))
    assert stored.document == {
        "channels": {"webhook": False, "email": True},
        "categories": {"account": {"email": False}, "other": {"webhook": True, "email": True}},
        "quiet_hours": {"start": "22:00", "end": "07:00", "weekdays": [1, 5], "time_zone": "Europe/Berlin"},
    }


async def test_the_mask_names_what_is_changed(client: Preferences) -> None:
    await client.update(wanted(channels={"email": False}, quiet_hours=HOURS), ["channels", "quiet_hours"])
    # What it does not name stays, whatever the message has; what is named and not set is emptied.
    changed = await client.update(
        wanted(channels={"webhook": False}, categories={"a": {"email": True}}), ["categories"]
    )
    assert (changed.version, dict(changed.channels), changed.quiet_hours.start) == (2, {"email": False}, "22:00")
    changed = await client.update(wanted(), ["quiet_hours", "channels"])
    assert (changed.version, dict(changed.channels), changed.HasField("quiet_hours")) == (3, {}, False)
    assert list(changed.categories) == ["a"]


async def test_a_stale_version_changes_nothing(client: Preferences, connection: Connection) -> None:
    with pytest.raises(ApiError) as caught:
        await client.update(wanted(version=1, channels={"email": False}), ["channels"])
    assert caught.value.metadata["current_version"] == "0"
    await client.update(wanted(channels={"email": False}), ["channels"])
    await client.update(wanted(version=1, channels={"webhook": False}), ["channels"])
    with pytest.raises(ApiError) as caught:
        await client.update(wanted(version=1, channels={"in_app": False}), ["channels"])
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ABORTED, "STALE_VERSION")
    assert caught.value.metadata == {"user_id": USER, "version": "1", "current_version": "2"}
    assert (await store.find(connection, uuid.UUID(USER))).document == {"channels": {"webhook": False}}


async def test_updates_at_once_lose_nothing(client: Preferences) -> None:
    async def change(number: int) -> int:
        field = "channels" if number % 2 else "quiet_hours"
        return (await client.update(wanted(channels={"email": False}, quiet_hours=HOURS), [field])).version

    assert sorted(await asyncio.gather(*(change(number) for number in range(8)))) == [*range(1, 9)]
    found = await client.get(USER)
    assert (dict(found.channels), found.quiet_hours.end) == ({"email": False}, "07:00")


def _hours(**fields: Any) -> pb.Preferences:
    return wanted(quiet_hours=pb.Preferences.QuietHours(**{"start": "22:00", "end": "07:00", **fields}))


@pytest.mark.parametrize(
    ("given", "mask", "fields"),
    [
        (wanted(), [], ["update_mask"]),
        (wanted(), ["version", "effective"], ["update_mask", "update_mask"]),
        (pb.Preferences(), ["channels"], ["user_id"]),
        (pb.Preferences(user_id="ada"), ["channels"], ["user_id"]),
        (wanted(channels={"sms": True}), ["channels"], ["channels"]),
        (wanted(categories={"*": {"email": True}}), ["categories"], ["categories"]),
        (wanted(categories={"a": {}, "b": {"sms": True}}), ["categories"], ["categories.a", "categories.b"]),
        (wanted(categories={"security": {"email": False}}), ["categories"], ["categories.security"]),
        (wanted(categories={f"c{number}": {"email": True} for number in range(201)}), ["categories"], ["categories"]),
        (_hours(start="", end=""), ["quiet_hours"], ["quiet_hours.start", "quiet_hours.end"]),
        (_hours(start="24:00", end="7:00"), ["quiet_hours"], ["quiet_hours.start", "quiet_hours.end"]),
        (_hours(weekdays=[0]), ["quiet_hours"], ["quiet_hours.weekdays"]),
        (_hours(weekdays=[2, 2]), ["quiet_hours"], ["quiet_hours.weekdays"]),
        (_hours(start="22:00", end="22:00"), ["quiet_hours"], ["quiet_hours"]),
        (_hours(time_zone="Europe/Nowhere"), ["quiet_hours"], ["quiet_hours.time_zone"]),
        (_hours(time_zone="../../etc/passwd"), ["quiet_hours"], ["quiet_hours.time_zone"]),
        (_hours(time_zone="Europe"), ["quiet_hours"], ["quiet_hours.time_zone"]),
    ],
)
async def test_nothing_malformed_is_stored(
    client: Preferences, connection: Connection, given: pb.Preferences, mask: list[str], fields: list[str]
) -> None:
    with pytest.raises(ApiError) as caught:
        await client.update(given, mask)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert [one.field.removeprefix("preferences.") for one in caught.value.violations] == fields
    assert await store.find(connection, uuid.UUID(USER)) == store.Stored()


async def test_the_categories(client: Preferences) -> None:
    assert await client.categories() == (
        pb.Category(name="news", quiet_hours=False, off=["email", "webhook"]),
        pb.Category(name="security", mandatory=True, quiet_hours=False),
        pb.Category(name="*", quiet_hours=True, off=["in_app"]),
    )


async def test_a_suppressed_address_is_refused_with_the_reason(client: Preferences) -> None:
    made = await client.suppress("Ada@Example.COM", pb.Suppression.BOUNCED, detail="no such mailbox")
    assert (made.channel, made.target, made.detail, made.actor) == ("email", "ada@example.com", "no such mailbox", "")
    assert made.HasField("create_time")
    with pytest.raises(ApiError) as caught:
        await client.suppress("ada@example.com")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "SUPPRESSED")
    assert caught.value.metadata == {"channel": "email", "target": "ada@example.com", "reason": "BOUNCED"}
    assert [one async for one in client.suppressions(target="ADA@example.com")] == [made]
    assert await client.suppression("ADA@example.com") == made
    assert await client.unsuppress("ADA@example.com") == made
    with pytest.raises(ApiError) as caught:
        await client.unsuppress("ada@example.com")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_SUPPRESSED")
    assert [one async for one in client.suppressions()] == []


async def test_one_suppression_is_got_by_its_address(client: Preferences) -> None:
    await client.suppress("bob@example.com")
    with pytest.raises(ApiError) as caught:
        await client.suppression("Ada@example.com")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_SUPPRESSED")
    assert caught.value.metadata == {"channel": "email", "target": "Ada@example.com"}
    for given, fields in (
        ({"target": "ada"}, ["target"]),
        ({"target": "bob@example.com", "channel": ""}, ["channel"]),
        ({"target": "a\0@b.c", "channel": "webhook"}, ["channel", "target"]),
    ):
        with pytest.raises(ApiError) as caught:
            await client.suppression(**given)
        assert [one.field for one in caught.value.violations] == fields


async def test_suppressions_are_paged_and_filtered(client: Preferences) -> None:
    for number in (4, 2, 0, 3, 1):
        reason = pb.Suppression.MANUAL if number % 2 else pb.Suppression.COMPLAINED
        await client.suppress(f"user{number}@example.com", reason)
    for size in (1, 2, 5, 0):
        seen = [one.target async for one in client.suppressions(page_size=size)]
        assert seen == [f"user{number}@example.com" for number in range(5)]
    manual = [one.target async for one in client.suppressions(reason=pb.Suppression.MANUAL, page_size=1)]
    assert manual == ["user1@example.com", "user3@example.com"]
    assert [one async for one in client.suppressions(channel="webhook")] == []


async def test_tokens_of_other_lists_are_refused(client: Preferences) -> None:
    for number in range(2):
        await client.suppress(f"user{number}@example.com")
    page = await client._stub.ListSuppressions(pb.ListSuppressionsRequest(page_size=1))
    other = pb.ListSuppressionsRequest.Filter(reason=pb.Suppression.MANUAL)
    said = []
    for request in (
        pb.ListSuppressionsRequest(page_token="?"),
        pb.ListSuppressionsRequest(page_token=page.next_page_token[:16]),
        pb.ListSuppressionsRequest(page_token="AQ"),
        pb.ListSuppressionsRequest(page_token=page.next_page_token, filter=other),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client._stub.ListSuppressions(request)
        said.append((caught.value.code(), caught.value.details()))
    assert page.next_page_token
    assert [code for code, _ in said] == [grpc.StatusCode.INVALID_ARGUMENT] * 4
    assert "other filters" in str(said[3][1])


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"target": "a@b.c", "channel": "webhook"}, ["suppression.channel"]),
        ({"target": "ada"}, ["suppression.target"]),
        ({"target": "a b@c"}, ["suppression.target"]),
        ({"target": "a@" + "b" * 320}, ["suppression.target"]),
        ({"target": "a@b.c", "reason": 0}, ["suppression.reason"]),
        ({"target": "a@b.c", "reason": 9}, ["suppression.reason"]),
        ({"target": "a@b.c", "detail": "x" * 501}, ["suppression.detail"]),
        ({"target": "a\0@b.c", "detail": "\0"}, ["suppression.target", "suppression.detail"]),
    ],
)
async def test_suppressions_that_are_invalid(client: Preferences, given: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(ApiError) as caught:
        await client.suppress(**given)
    assert [one.field for one in caught.value.violations] == fields
    assert [one async for one in client.suppressions()] == []


async def test_the_service_serves_them_from_the_operators_file(
    notifications_database: Database, services: Services, tmp_path: Path
) -> None:
    file = write(tmp_path / "categories.toml", _FILE)
    process = services.notifications(notifications_database, "127.0.0.1:1", categories_file=file)
    await process.start()
    async with grpc.aio.insecure_channel(process.address) as channel:
        client = Preferences(channel)
        assert [one.name for one in await client.categories()] == ["news", "security", "*"]
        await client.update(wanted(channels={"email": False}), ["channels"])
        assert applies(await client.get(USER))["security", "email"] == (True, "MANDATORY", False)
        health: Any = health_pb2_grpc.HealthStub(channel)
        name = "tidings.notifications.v1.PreferenceService"
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_wrong_category_ends_it_with_one_line(services: Services, tmp_path: Path) -> None:
    file = write(tmp_path / "categories.toml", '[[categories]]\nname = "news"\noff = ["sms"]\n')
    process = services.notifications("postgresql://127.0.0.1:1/none", "127.0.0.1:1", categories_file=file)
    await process.launch()
    assert await process.wait() == 2
    (line,) = [line for line in process.lines if line.startswith("error: ")]
    assert "'news'" in line
    assert "off" in line
