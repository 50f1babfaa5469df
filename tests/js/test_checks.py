"""What no service does, written out message by message: the client must notice."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from tests.client.conftest import (
    Response,
    ScriptedUsers,
    bookmark,
    drain,
    events,
    fails,
    sends,
    snapshot_begin,
    snapshot_end,
    snapshot_page,
    token,
)
from tests.harness import until
from tests.js.conftest import Client
from tests.js.printed import (
    marks_of,
    messages_of,
    passed,
    positions_of,
    refusal,
    wait_printed,
)
from tidings.users.v1 import users_pb2

_VECTORS = Path(__file__).parents[1] / "vectors" / "shard_hash.json"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([events(1, 1)], "the first message is no bookmark"),
        ([bookmark(0, resume="")], "the first message is no bookmark"),
        ([bookmark(0), events(1, 2), events(4, 5)], "gap: the previous_position of a message is 3, expected 2"),
        ([bookmark(0), events(1, 2), events(2, 3)], "gap: the previous_position of a message is 1, expected 2"),
        (
            [bookmark(0), Response(events=[users_pb2.UserEvent(position=2)], resume_token="t", position=2)],
            "gap: the position of an event is 2, expected 1",
        ),
        (
            [bookmark(0), Response(events=[users_pb2.UserEvent(position=1)], resume_token="t", position=2)],
            "gap: the position of a message is 2, expected 1",
        ),
        (
            [bookmark(2**53), bookmark(2**53 + 1)],
            f"gap: the previous_position of a message is {2**53 + 1}, expected {2**53}",
        ),
        ([bookmark(0), snapshot_begin(0), events(1, 1)], "a TYPE_UNSPECIFIED event at position 1, inside"),
        ([bookmark(7), snapshot_page(7, users_pb2.User(id="a"))], "a SNAPSHOT event at position 7, outside"),
    ],
)
async def test_a_broken_promise_ends_it(
    client: Client, scripted: ScriptedUsers, messages: list[Response], said: str
) -> None:
    scripted.scripts = [sends(*messages, then_silent=True)]
    start = "snapshot" if "event at position" in said else "earliest"
    code, last = await refusal(client("watch", "--address", scripted.address, "--from", start))
    assert code == 1
    assert last.startswith(f"error: {said}")


async def test_a_gap_over_a_reconnect_ends_it(client: Client, scripted: ScriptedUsers) -> None:
    scripted.scripts = [sends(bookmark(0), events(1, 2), drain(2, 0.1)), sends(bookmark(3), events(4, 4))]
    code, last = await refusal(client("watch", "--address", scripted.address))
    assert (code, last) == (1, "error: gap: the previous_position of a message is 3, expected 2")
    assert scripted.tokens() == [None, token(2)]


async def test_a_user_of_another_shard_ends_it(client: Client, scripted: ScriptedUsers) -> None:
    vector = json.loads(_VECTORS.read_text())["vectors"][0]
    event = users_pb2.UserEvent(position=1, user={"id": vector["id"]})
    message = Response(events=[event], resume_token=token(1), position=1)
    scripted.scripts = [sends(bookmark(0), message, then_silent=True)]
    wrong = (vector["index"]["3"] + 1) % 3
    code, last = await refusal(client("watch", "--address", scripted.address, "--shard", f"{wrong}/3"))
    assert code == 1
    assert f"is of shard {vector['index']['3']}/3" in last


async def test_a_group_that_was_cut_off_comes_again(client: Client, scripted: ScriptedUsers) -> None:
    scripted.scripts = [
        fails(grpc.StatusCode.UNAVAILABLE),
        sends(bookmark(0), events(1, 2), events(3, 4, inside_group=True)),
        sends(bookmark(2), events(3, 4, inside_group=True), events(5, 5), then_silent=True),
    ]
    watcher = client("watch", "--address", scripted.address)
    await watcher.launch()
    messages = await wait_printed(watcher, passed(5))
    assert positions_of(messages) == [1, 2, 3, 4, 5]
    assert scripted.tokens() == [None, None, token(2)]


async def test_three_intervals_of_silence_are_a_dead_connection(client: Client, scripted: ScriptedUsers) -> None:
    scripted.scripts = [
        sends(bookmark(0), events(1, 1), then_silent=True),
        sends(bookmark(1), events(2, 2), then_silent=True),
    ]
    watcher = client("watch", "--address", scripted.address, "--bookmark-interval", "0.2")
    await watcher.launch()
    messages = await wait_printed(watcher, passed(2))
    assert positions_of(messages) == [1, 2]
    assert scripted.tokens()[:2] == [None, token(1)]
    assert "no message for 3 bookmark intervals" in watcher.tail()


async def test_users_that_a_snapshot_does_not_name_leave_the_copy(client: Client, scripted: ScriptedUsers) -> None:
    one, two = users_pb2.User(id="one", version=1), users_pb2.User(id="two", version=1)
    scripted.scripts = [
        sends(bookmark(3), snapshot_begin(3), snapshot_page(3, one), snapshot_end(3), drain(3, 0)),
        sends(bookmark(3), snapshot_begin(5, after=3), snapshot_page(5, two), snapshot_end(5), then_silent=True),
    ]
    watcher = client("watch", "--address", scripted.address, "--from", "snapshot")
    await watcher.launch()
    await wait_printed(watcher, passed(5))
    await until(lambda: marks_of(messages_of(watcher)).count("snapshot_end") == 2)
    assert await watcher.stop() == 0
    assert [user["id"] for user in watcher.records[-1]["copy"]] == ["two"]
