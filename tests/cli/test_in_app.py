"""`tidings notifications inbox` shows what is there and marks it."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import NOW, System, Tidings
from tidings.notifications.v1 import in_app_pb2, notifications_pb2

_UPDATE, _LIST = in_app_pb2.UpdateInAppNotificationsRequest, in_app_pb2.ListInAppNotificationsRequest
_COUNTS = "3 there, 1 unseen, 2 unread"


@pytest.fixture(autouse=True)
def two_notifications(system: System) -> None:
    """One is read and archived, the other new; its subject would steer a terminal."""
    system.in_app.notifications = [
        notifications_pb2.Notification(id="2", position=9, category="account", subject="Hi\x1b[2J", create_time=NOW),
        notifications_pb2.Notification(
            id="1", position=4, category="account", subject="Old", seen_time=NOW, read_time=NOW, archive_time=NOW
        ),
    ]
    system.inbox.notifications = system.in_app.notifications[:1]


async def test_the_list(system: System, tidings: Tidings) -> None:
    ran = await tidings(
        "notifications", "inbox", "list", "u", "--unread", "--archived", "only", "--category", "account"
    )
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[1] == ["9", "2023-11-14", "22:13:20Z", "new", "account", "Hi\\x1b[2J", "2"]
    assert rows[2] == ["4", "read", "archived", "account", "Old", "1"]
    matching = _LIST.Filter(unread=True, archived=_LIST.ONLY, category="account")
    assert system.in_app.asked == [_LIST(user_id="u", page_size=51, filter=matching)]


async def test_the_counts(tidings: Tidings) -> None:
    assert (await tidings("notifications", "inbox", "counts", "u")).out == f"{_COUNTS}\n"
    ran = await tidings("notifications", "inbox", "counts", "u", "--json")
    assert json.loads(ran.out) == {"total": "3", "unseen": "1", "unread": "2", "position": "9"}


@pytest.mark.parametrize("verb", ["seen", "read", "unread", "archive", "unarchive"])
async def test_marks(system: System, tidings: Tidings, verb: str) -> None:
    change = _UPDATE.Change.Value(verb.upper())
    ran = await tidings("notifications", "inbox", verb, "u", "1", "2")
    assert (ran.code, ran.out, ran.err) == (0, f"2 changed; {_COUNTS}\n", "")
    ran = await tidings("notifications", "inbox", verb, "u", "--up-to", "9", "--json")
    assert json.loads(ran.out)["changed"] == "7"
    assert system.in_app.asked == [
        _UPDATE(user_id="u", change=change, ids=["1", "2"]),
        _UPDATE(user_id="u", change=change, up_to_position=9),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["u", "3"], 4, "no such: 3"),
        (["u"], 2, "give ids, or --up-to"),
        (["u", "1", "--up-to", "2"], 2, "give ids, or --up-to"),
        (["u", "--up-to", "0"], 2, "--up-to"),
    ],
)
async def test_refusals(tidings: Tidings, arguments: list[str], code: int, message: str) -> None:
    ran = await tidings("notifications", "inbox", "read", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err


async def test_the_watch_tells_notifications_and_counts(tidings: Tidings) -> None:
    ran = await tidings("notifications", "inbox", "watch", "u", "--limit", "1")
    assert ran.out.splitlines() == [
        "        9  2023-11-14 22:13:20Z  account       Hi\\x1b[2J",
        "1 there, 1 unseen, 1 unread",
    ]


async def test_help_has_examples(tidings: Tidings) -> None:
    for verb in ("list", "counts", "watch", "read", "unarchive"):
        ran = await tidings("notifications", "inbox", verb, "--help")
        assert (ran.code, f"tidings notifications inbox {verb} USER" in ran.out) == (0, True)
