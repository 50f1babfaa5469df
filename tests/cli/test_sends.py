"""`tidings sends` against the real service's methods and its sender, on a real Postgres."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc.aio
import pytest

from notification_service import lanes
from notification_service.api.notifications import NotificationService
from notification_service.api.sends import SendService
from notification_service.compose import Composer
from notification_service.domain import Person
from notification_service.sender import Sender
from notification_service.store import feed, recipients
from notification_service.tail import Tail
from notification_service.templates import Templates
from notification_service.watch import Streams
from servicekit import callers, database, guard
from tests.cli.conftest import System, Tidings
from tests.harness import Database
from tests.notifications.conftest import explainer
from tidings.notifications.v1 import notifications_pb2_grpc, sends_pb2_grpc

ADA = uuid.UUID(int=1)
NEWS = ("create", "news", "--category", "news", "--channel", "in_app")


@pytest.fixture
async def service(system: System, notifications_database: Database, tmp_path: Path) -> AsyncIterator[None]:
    """The service in place of what answers for the other commands; it knows ada, of the plan gold."""
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "news.subject.txt").write_text("News for {{ name }}")
    (folder / "news.txt").write_text("{{ params.what | default('nothing') }}")
    composer = Composer((), Templates(folder), lanes.writers("no-reply@example.com", ()))
    async with database.pool(notifications_database.url, "tests", size=4) as pool:
        sender = Sender(pool, composer, lambda: None, turn=5.0, poll_interval=0.05)

        async def head() -> tuple[uuid.UUID, int]:
            return uuid.UUID(int=7), 1

        async with pool.connection() as connection:
            await feed.read_cursor(connection)
            held = await recipients.take(connection, uuid.uuid4(), 600.0)
            assert held is not None
            ada = Person(ADA, 1, "ada", "ada@example.com", "Ada", "", "", {"plan": "gold"}, None, None)
            await recipients.store(
                connection,
                held,
                [recipients.Named(ADA, 1, ada)],
                token="1",
                lease=600.0,
                head_position=1,
                position=1,
                part="end",
                log_id=uuid.UUID(int=7),
            )
        streams = Streams(
            pool, Tail(pool, 0.05), max_streams=1, max_streams_per_caller=1, max_stream_age=1800.0, reconnect_spread=3.0
        )
        server = grpc.aio.server()
        for add, servicer in (
            (sends_pb2_grpc.add_SendServiceServicer_to_server, SendService(pool, composer, head, sender.wake)),
            (
                notifications_pb2_grpc.add_NotificationServiceServicer_to_server,
                NotificationService(pool, streams, explainer(pool), lambda: None),
            ),
        ):
            guard.add(server, callers.anyone, add, servicer)
        system.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        loop = asyncio.create_task(sender.run())
        yield
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await server.stop(None)


@pytest.mark.usefixtures("service")
async def test_create_wait_show_list(tidings: Tidings, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text(f"{ADA}\n\n{uuid.UUID(int=2)}\n")
    ran = await tidings("sends", *NEWS, "--users-file", "ids.txt", "--params", '{"what": 3}', "--wait", "--json")
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == "sent: 2 users passed, 1 notifications made"
    made = json.loads(ran.out)
    assert (made["state"], made["params"], made["unknown_user_ids"]) == ("SENT", {"what": 3}, [str(uuid.UUID(int=2))])
    ran = await tidings("sends", "show", made["id"])
    shown = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert (shown["state"], shown["matched"], shown["made"], shown["recipients"]) == (
        "sent", "2", "1", "2 users by their ids"
    )  # fmt: skip
    ran = await tidings("notifications", "list", "--send", made["id"], "--json")
    [note] = [json.loads(line) for line in ran.out.splitlines()]
    assert (note["user_id"], note["subject"], note["body"]) == (str(ADA), "News for Ada", "3\n")
    assert (await tidings("notifications", "list", "--send", str(uuid.uuid4()), "--json")).out == ""

    ran = await tidings("sends", *NEWS, "--label", "plan=gold", "--wait")
    assert ran.code == 0
    assert 'users with {"labels":{"plan":"gold"}}' in ran.out
    ran = await tidings("sends", "list", "--state", "sent", "--limit", "1")
    assert ran.out.splitlines()[1].split()[2:7] == ["sent", "news", "news", "in_app", "1/1"]
    assert ran.err == "1 shown; there are more: --limit N or --all\n"


@pytest.mark.usefixtures("service")
async def test_dry_run_schedule_and_cancel(tidings: Tidings) -> None:
    ran = await tidings("sends", *NEWS, "--everybody", "--dry-run")
    shown = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert (ran.code, shown["state"], shown["matched"]) == (0, "not sent: --dry-run", "1")
    assert (await tidings("sends", "list", "--json")).out == ""

    later = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    key = str(uuid.uuid4())
    ran = await tidings("sends", *NEWS, "--user", str(ADA), "--at", later, "--request-id", key, "--json")
    made = json.loads(ran.out)
    assert (made["state"], made["send_time"]) == ("SCHEDULED", later)
    again = await tidings("sends", *NEWS, "--user", str(ADA), "--at", later, "--request-id", key, "--json")
    assert json.loads(again.out)["id"] == made["id"]
    ran = await tidings("sends", "cancel", made["id"])
    assert (ran.code, "cancelled" in ran.out) == (0, True)
    assert (await tidings("notifications", "list", "--json")).out == ""


@pytest.mark.usefixtures("service")
async def test_refusals(tidings: Tidings) -> None:
    for arguments, code, message in (
        ((*NEWS,), 2, "give users by their ids, or a filter, or --everybody"),
        ((*NEWS, "--user", "1", "--everybody"), 2, "give users by their ids, or a filter, or --everybody"),
        ((*NEWS, "--everybody", "--params", "[]"), 2, "must be a JSON object"),
        ((*NEWS, "--everybody", "--at", "2027-01-31T09:00:00"), 2, "--at"),
        ((*NEWS, "--user", "ada"), 3, "send.recipients.user_ids.ids[0]: must be a UUID"),
        ((*NEWS, "--everybody", "--channel", "email"), 5, "news.html"),
        (("create", "no", "--category", "c", "--channel", "in_app", "--everybody"), 4, "no such template: no"),
        (("cancel", str(ADA)), 4, "no send"),
    ):
        ran = await tidings("sends", *arguments)
        assert (ran.code, message in ran.err) == (code, True), ran.err
