"""Digests on a real Postgres: gathered with the events, closed once, and delivered as any other mail."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from notification_service import categories, digester, domain, gate, metrics
from notification_service.gate import Candidate, Defer, Send
from notification_service.store import digests as store
from notification_service.store import leases, reads
from servicekit import database
from tests.notifications.conftest import TRACE_PARENT, Events, eventually, write
from tests.notifications.digesting import LEASE, RULES, Site, compose_of, renamed, said
from tidings.notifications.v1 import digests_pb2, notifications_pb2


async def test_mails_wait_until_their_window_closes_and_go_out_as_one(site: Site, events: Events) -> None:
    user = events.user("ada", locale="de", time_zone="Asia/Tokyo")
    made = [renamed(events, user, f"Ada {number}") for number in range(2)]
    await site.store(made[0])
    await site.store(made[1])
    [digest] = await site.digests()
    assert (digest.name, digest.target, digest.category, digest.user_id) == (
        "hourly", "ada@example.com", "social", user.id
    )  # fmt: skip
    assert (digest.state, digest.gathers) == (digests_pb2.Digest.OPEN, True)
    assert digest.close_time.ToDatetime() - digest.open_time.ToDatetime() == timedelta(hours=1)
    first, second = (str(domain.notification_id(uuid.UUID(one.id), "renamed")) for one in made)
    assert list(digest.item_notification_ids) == [first, second]
    assert digest.id == str(domain.digest_id(uuid.UUID(first), "hourly", "ada@example.com"))
    # The app does not wait, and says where the mail went.
    found = await reads.list_notifications(site.connection, {}, 1 << 62, 10)
    assert [(one.subject, list(one.channels), one.digest_id) for one in found] == [
        ("Ada 1", ["email", "in_app"], digest.id),
        ("Ada 0", ["email", "in_app"], digest.id),
    ]
    assert await site.deliveries() == []

    await site.pass_time(timedelta(minutes=59))
    assert await site.digester().close_due() == 0
    await site.pass_time(timedelta(minutes=1))
    assert await site.digester().close_due() == 1
    assert site.closed == 1
    [closed] = await site.digests()
    [delivery] = await site.deliveries()
    assert (closed.state, closed.notification_id) == (digests_pb2.Digest.CLOSED, delivery.notification_id)
    assert closed.end_time.ToDatetime() >= closed.close_time.ToDatetime()
    assert (delivery.channel, delivery.target, delivery.state) == (
        "email", "ada@example.com", notifications_pb2.Delivery.PENDING
    )  # fmt: skip
    assert (delivery.event_id, delivery.trace_parent) == (made[0].id, TRACE_PARENT)
    mail = (await site.mails())[delivery.id]
    assert (mail.subject, mail.text) == ("2 changes", "[1 Ada 0|Ada 0][2 Ada 1|Ada 1]\n")
    assert (mail.name, mail.html) == ("Ada 1", mail.text.strip())
    [note] = await reads.list_notifications(site.connection, {"digest_id": closed.id}, 1 << 62, 1)
    assert (note.rule, list(note.channels), note.id, note.position) == (
        "digest:hourly", ["email"], closed.notification_id, 3
    )  # fmt: skip
    [[zone]] = await site.all("SELECT time_zone FROM notifications WHERE position = 3")
    assert zone == "Asia/Tokyo"
    # What comes now waits for the next one.
    await site.store(renamed(events, user))
    assert [one.state for one in await site.digests()] == [digests_pb2.Digest.OPEN, digests_pb2.Digest.CLOSED]


async def test_a_full_digest_closes_at_once_and_the_next_item_opens_another(site: Site, events: Events) -> None:
    user = events.user("ada")
    await site.store(*(renamed(events, user, f"Ada {number}") for number in range(4)))
    newer, full = await site.digests()
    assert [len(one.item_notification_ids) for one in (newer, full)] == [1, 3]
    assert (newer.gathers, full.gathers) == (True, False)
    assert await site.digester().close_due() == 1
    assert [one.state for one in await site.digests()] == [digests_pb2.Digest.OPEN, digests_pb2.Digest.CLOSED]


async def test_another_address_has_another_window(site: Site, events: Events) -> None:
    user = events.user("ada")
    await site.store(renamed(events, user), events.updated(user, email="ada@new.example"))
    new, old = await site.digests()
    assert (new.target, len(new.item_notification_ids)) == ("ada@new.example", 1)
    assert (old.target, len(old.item_notification_ids)) == ("ada@example.com", 2)
    await site.close_all()
    assert {one.target: (await site.mails())[one.id].subject for one in await site.deliveries()} == {
        "ada@example.com": "2 changes",
        "ada@new.example": "1 changes",
    }


async def test_two_digests_that_begin_with_one_event_are_told_apart(site: Site, events: Events) -> None:
    await site.store(events.updated(events.user("ada"), email="ada@new.example"))
    await asyncio.gather(*(site.digester().flush(uuid.UUID(one.id)) for one in await site.digests()))
    found = [one for one in await reads.list_notifications(site.connection, {}, 1 << 62, 10) if one.rule != "moved"]
    assert len({one.id for one in found}) == len({one.event_id for one in found}) + 1 == 2
    [other] = {one.rule for one in found} - {"digest:hourly"}
    assert other in {f"digest:hourly:{one.digest_id[:8]}" for one in found}
    assert {one.target for one in await site.deliveries()} == {"ada@example.com", "ada@new.example"}


async def test_an_item_that_comes_while_its_window_closes_opens_another(site: Site, events: Events) -> None:
    user = events.user("ada")
    await site.store(renamed(events, user, "one"))
    await site.pass_time(timedelta(hours=1))
    [taken] = await store.take(site.connection, 5, LEASE)
    await site.store(renamed(events, user, "two"))
    views = await store.items(site.connection, [taken.id])
    made = said(site, taken, views[taken.id])
    assert await store.close(site.connection, [made]) == 1
    assert await store.close(site.connection, [made]) == 0
    new, old = await site.digests()
    assert (new.state, old.state) == (digests_pb2.Digest.OPEN, digests_pb2.Digest.CLOSED)
    assert [len(one.item_notification_ids) for one in (new, old)] == [1, 1]
    assert [one.text for one in (await site.mails()).values()] == ["[1 one|one]\n"]


async def test_the_inbox_waits_for_who_takes_a_digest(site: Site, events: Events, url: str) -> None:
    user = events.user("ada")
    await site.store(renamed(events, user, "one"))
    await site.pass_time(timedelta(hours=1))
    async with await database.connect(url, "closer") as closer:
        async with closer.transaction():
            assert len(await store.take(closer, 5, LEASE)) == 1
            storing = asyncio.create_task(site.store(renamed(events, user, "two")))

            async def waits() -> bool:
                row = await (
                    await closer.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                        " AND datname = current_database()"
                    )
                ).fetchone()
                return row == (1,)

            await eventually(waits)
        await storing
    assert [len(one.item_notification_ids) for one in await site.digests()] == [1, 1]


async def test_replicas_that_close_the_same_digests_make_one_mail_of_each(site: Site, events: Events) -> None:
    await site.store(*(renamed(events, events.user(f"user{number}")) for number in range(50)))
    await site.pass_time(timedelta(hours=1))
    # Whose lease is over before it has stored what it said is one of several.
    async with site.pool.connection() as one:
        slow = await store.take(one, 30, LEASE)
        views = await store.items(one, [window.id for window in slow])
        made = [said(site, window, views[window.id]) for window in slow]
        await site.pass_time(timedelta(seconds=LEASE))

        async def close() -> None:
            while await site.digester().close_due():
                pass

        await asyncio.gather(store.close(one, made), close(), close())
    assert {one.state for one in await site.digests()} == {digests_pb2.Digest.CLOSED}
    found = await site.deliveries()
    assert len(found) == len({one.target for one in found}) == 50
    positions = [row[0] for row in await site.all("SELECT position FROM notifications ORDER BY position")]
    assert positions == list(range(1, 101))
    assert await site.all("SELECT notification_position, delivery_position FROM inbox") == [(100, 50)]


async def test_a_deleted_user_gets_no_digest_but_of_what_comes_after(site: Site, events: Events) -> None:
    ada, bob = events.user("ada"), events.user("bob")
    await site.store(*(renamed(events, ada) for _ in range(4)), renamed(events, bob))
    # One of them is being closed at that moment.
    [taken] = await store.take(site.connection, 5, LEASE)
    await site.store(events.deleted(ada), renamed(events, ada, "back"))
    by_user: dict[str, list[digests_pb2.Digest]] = {ada.id: [], bob.id: []}
    for one in await site.digests():
        by_user[one.user_id].append(one)
    assert [(one.state, one.end_reason) for one in by_user[ada.id]] == [
        (digests_pb2.Digest.OPEN, ""),
        (digests_pb2.Digest.CANCELLED, "USER_DELETED"),
        (digests_pb2.Digest.CANCELLED, "USER_DELETED"),
    ]
    assert all(one.HasField("end_time") for one in by_user[ada.id][1:])
    assert [one.state for one in by_user[bob.id]] == [digests_pb2.Digest.OPEN]
    views = await store.items(site.connection, [taken.id])
    made = said(site, taken, views[taken.id])
    assert await store.close(site.connection, [made]) == 0
    await site.close_all()
    pending = [one for one in await site.deliveries() if one.state == notifications_pb2.Delivery.PENDING]
    mails = await site.mails()
    assert {mails[one.id].text for one in pending} == {"[7 back|back]\n", "[5 Ada|Ada]\n", "one\n"}


async def test_what_cannot_be_rendered_is_parked_and_says_why(site: Site, events: Events, tmp_path: Path) -> None:
    await site.store(renamed(events, events.user("ada")))
    site.composer = compose_of(tmp_path, said="{{ items[0].user.labels.tier }}")
    await site.close_all()
    [delivery] = await site.deliveries()
    assert (delivery.state, delivery.end_reason) == (notifications_pb2.Delivery.PARKED, "NOT_COMPOSED")
    assert "has no attribute 'tier'" in delivery.attempts[0].detail
    assert [one.state for one in await site.digests()] == [digests_pb2.Digest.CLOSED]


async def test_digests_of_many_items_are_said_apart_and_closed_together(
    site: Site, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digester, "_ITEMS_AT_ONCE", 2)
    counts = {f"user{number}@example.com": count for number, count in enumerate((1, 1, 3, 2))}
    users = [events.user(f"user{number}") for number in range(4)]
    await site.store(*(renamed(events, user) for user in users for _ in range(counts[user.email])))
    await site.pass_time(timedelta(hours=1))
    assert await site.digester().close_due() == 4
    mails = await site.mails()
    names = {one.target: mails[one.id].text.count("Ada") for one in await site.deliveries()}
    assert names == {address: 2 * count for address, count in counts.items()}
    assert site.closed == 1


async def test_what_another_release_has_stored_does_not_stop_the_others(site: Site, events: Events) -> None:
    await site.store(renamed(events, events.user("ada")), renamed(events, events.user("bob")))
    await site.connection.execute("UPDATE digest_items SET view = '[1]' WHERE view->'user'->>'username' = 'ada'")
    await site.close_all()
    found = {one.target: one for one in await site.deliveries()}
    assert found["ada@example.com"].end_reason == "NOT_COMPOSED"
    assert "cannot be read" in found["ada@example.com"].attempts[0].detail
    assert found["bob@example.com"].state == notifications_pb2.Delivery.PENDING


async def test_a_digest_that_is_in_the_file_no_more_closes_as_it_was(
    site: Site, events: Events, tmp_path: Path
) -> None:
    await site.store(renamed(events, events.user("ada", locale="en-GB")))
    without = re.sub(r"digest = .*\n", "", RULES).replace(RULES[: RULES.index("[[rules]]")], "")
    site.composer = compose_of(tmp_path, without)
    assert not site.composer.digests
    await site.close_all()
    assert [one.text for one in (await site.mails()).values()] == ["[1 Ada|Ada]\n"]


async def test_a_subject_that_cannot_be_rendered_leaves_no_item_out(site: Site, events: Events, tmp_path: Path) -> None:
    site.composer = compose_of(tmp_path)
    write(tmp_path / "templates" / "single.subject.txt", "{{ user.labels.tier }}")
    site.composer.templates.reload([])
    await site.store(events.updated(events.user("ada"), email="ada@new.example"))
    await site.close_all()
    assert [one.text for one in (await site.mails()).values()] == ["[1 |]\n", "[1 |]\n"]


async def test_the_mail_of_a_digest_passes_the_gate(site: Site, events: Events) -> None:
    user = events.user("ada", time_zone="Europe/Berlin")
    await site.store(renamed(events, user))
    await site.close_all()
    document = '{"quiet_hours": {"start": "22:00", "end": "07:00"}}'
    await site.connection.execute(
        "INSERT INTO preferences VALUES (%s, %s::text::jsonb, 1, now())", (uuid.UUID(user.id), document)
    )
    [picked], _ = await leases.pick(site.connection, "email", 5, None, seconds=5, max_tries=5, busy=[])
    candidate = Candidate(
        picked.user_id, picked.category, "email", picked.target, picked.time_zone, picked.document, picked.suppressed
    )
    night = datetime(2026, 11, 25, 22, 30, tzinfo=UTC)
    verdict = gate.decide(candidate, categories.load(None), night)
    assert isinstance(verdict, Defer)
    assert verdict.until == datetime(2026, 11, 26, 6, tzinfo=UTC)
    assert gate.decide(candidate, categories.load(None), verdict.until) == Send()


async def test_the_link_is_the_digest_s_and_is_not_gathered(site: Site, events: Events) -> None:
    site.composer = replace(site.composer, unsubscribe=lambda _, category, address: f"https://t/{category}/{address}")
    await site.store(renamed(events, events.user("ada")))
    await site.close_all()
    assert [one.unsubscribe_url for one in (await site.mails()).values()] == ["https://t/social/ada@example.com"]
    assert await site.all("SELECT view->>'unsubscribe_url' FROM digest_items") == [("",)]


async def test_a_digest_that_was_taken_by_one_that_died_is_taken_again(site: Site, events: Events) -> None:
    await site.store(renamed(events, events.user("ada")))
    await site.pass_time(timedelta(hours=1))
    assert len(await store.take(site.connection, 5, LEASE)) == 1
    assert await site.digester().close_due() == 0
    await site.pass_time(timedelta(seconds=LEASE))
    assert await site.digester().close_due() == 1
    assert len(await site.deliveries()) == 1


async def test_the_loop_closes_what_is_due_and_survives_a_database_that_is_away(site: Site, events: Events) -> None:
    await site.store(*(renamed(events, events.user(f"user{number}")) for number in range(30)))
    await site.pass_time(timedelta(hours=1))
    task = asyncio.create_task(site.digester().run())
    try:
        await eventually(lambda: _closed(site, 30))
        await site.connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()"
        )
        await site.store(renamed(events, events.user("later")))
        await site.pass_time(timedelta(hours=1))
        await eventually(lambda: _closed(site, 31))
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _closed(site: Site, wanted: int) -> bool:
    return [(wanted,)] == await site.all("SELECT count(*) FROM digests WHERE state = 2")


async def test_how_digests_stand(site: Site, events: Events) -> None:
    assert await store.standing(site.connection) == (0, 0.0)
    await site.store(renamed(events, events.user("ada")), renamed(events, events.user("bob")))
    assert await store.standing(site.connection) == (2, 0.0)
    await site.pass_time(timedelta(hours=2))
    opened, overdue = await store.standing(site.connection)
    assert opened == 2
    assert 3600 <= overdue < 7200
    metrics.Digests().found(opened, overdue)
    assert [list(one.read()) for one in (metrics.DIGESTS_OPEN, metrics.DIGESTS_OVERDUE)] == [[((), 2)], [((), overdue)]]


async def test_the_local_time_of_each_user_is_kept(site: Site, events: Events, tmp_path: Path) -> None:
    site.composer = compose_of(tmp_path, RULES.replace('window = "1h"', 'at = "08:00"'))
    zones = ["", "America/St_Johns", "Asia/Kathmandu", "Europe/Berlin", "Pacific/Kiritimati"]
    await site.store(*(renamed(events, events.user(f"user{n}", time_zone=zone)) for n, zone in enumerate(zones)))
    for one, zone in zip(await site.digests(), reversed(zones), strict=True):
        opened, closed = (time.ToDatetime(tzinfo=UTC) for time in (one.open_time, one.close_time))
        assert one.time_zone == zone
        assert opened < closed <= opened + timedelta(hours=25)
        assert f"{closed.astimezone(ZoneInfo(zone or 'UTC')):%H:%M:%S.%f}" == "08:00:00.000000"
