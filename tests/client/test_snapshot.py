"""Snapshots, selections and the copy that `Replica` makes of them."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.client.conftest import (
    Response,
    ScriptedUsers,
    bookmark,
    caught_up,
    events,
    fails,
    positions,
    sends,
    snapshot_begin,
    snapshot_end,
    snapshot_page,
    take,
    token,
)
from tests.client.model import Model
from tidings.client import (
    ForeignTokenError,
    GapError,
    LostPlaceError,
    MemoryCursor,
    PositionExpiredError,
    ProtocolError,
    Replica,
    User,
    UserEvent,
    UserFeed,
)
from tidings.users.v1 import users_pb2

ADA, BEA, CAL = (User(id=name, username=name, version=3) for name in ("ada", "bea", "cal"))


def change(
    position: int, user: users_pb2.User, kind: users_pb2.UserEvent.Type.ValueType = UserEvent.UPDATED, **more: object
) -> Response:
    """A message with one event."""
    return Response(
        events=[UserEvent(position=position, type=kind, user=user, **more)],
        resume_token=token(position),
        previous_position=position - 1,
        position=position,
    )


class TestBatches:
    async def test_tell_the_parts_of_a_snapshot(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [
            sends(
                bookmark(5),
                snapshot_begin(5),
                snapshot_page(5, ADA, BEA),
                bookmark(5, resume="bookmark"),
                snapshot_page(5, CAL),
                snapshot_end(5),
                events(6, 7),
                then_silent=True,
            )
        ]
        batches = await take(UserFeed(channel, start="snapshot"), 5)
        assert [batch.snapshot for batch in batches] == ["begin", "within", "within", "end", None]
        assert positions(batches) == [5, 5, 5, 6, 7]
        assert users.requests[0].WhichOneof("start") == "snapshot"

    async def test_progress_is_told_within_a_snapshot_too(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [sends(bookmark(5), snapshot_begin(5), bookmark(5), snapshot_end(5), caught_up(5))]
        batches = await take(UserFeed(channel, start="snapshot", progress=True), 5)
        assert [batch.snapshot for batch in batches] == [None, "begin", "within", "end", None]

    async def test_a_snapshot_goes_on_with_its_token(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [
            sends(bookmark(5), snapshot_begin(5), snapshot_page(5, ADA)),
            sends(bookmark(5), snapshot_page(5, BEA)),
            sends(bookmark(5), snapshot_end(5)),
            sends(bookmark(5), events(6, 6)),
        ]
        batches = await take(UserFeed(channel, start="snapshot"), 5)
        assert [batch.snapshot for batch in batches] == ["begin", "within", "within", "end", None]
        assert users.tokens() == [None, "token-5-ada", "token-5-bea", token(5)]

    async def test_another_process_goes_on_with_a_snapshot(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [sends(bookmark(5), snapshot_page(5, BEA), snapshot_end(5), events(6, 6), then_silent=True)]
        batches = await take(UserFeed(channel, cursor=MemoryCursor("token-5-ada")), 3)
        assert [batch.snapshot for batch in batches] == ["within", "end", None]

    async def test_a_snapshot_may_begin_beyond_the_bookmark(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [sends(bookmark(5), snapshot_begin(7, after=5), snapshot_end(7), events(8, 8))]
        assert positions(await take(UserFeed(channel, start="snapshot"), 3)) == [8]

    @pytest.mark.parametrize(
        "messages",
        [
            [snapshot_begin(5), snapshot_page(5, ADA), events(6, 6)],
            [events(6, 6), snapshot_page(6, ADA)],
            [events(6, 6), snapshot_end(6)],
            [snapshot_begin(5), snapshot_end(5), snapshot_end(5)],
            [snapshot_begin(5), Response(snapshot_end={"position": 5}, previous_position=5, position=5)],
            [
                snapshot_begin(5),
                Response(
                    events=[UserEvent(position=4, type=UserEvent.SNAPSHOT, user=ADA)],
                    resume_token="t",
                    previous_position=5,
                    position=5,
                ),
            ],
        ],
    )
    async def test_what_is_no_snapshot_is_an_error(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, messages: list[Response]
    ) -> None:
        users.scripts = [sends(bookmark(5), *messages, then_silent=True)]
        with pytest.raises(ProtocolError):
            await take(UserFeed(channel, start="snapshot"), 9)

    async def test_a_snapshot_passes_no_position(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        page = snapshot_page(5, ADA)
        page.position = 6
        users.scripts = [sends(bookmark(5), snapshot_begin(5), page, then_silent=True)]
        with pytest.raises(GapError):
            await take(UserFeed(channel, start="snapshot"), 9)


class TestFallBack:
    async def test_an_expired_place_is_given_up_for_a_snapshot_if_asked_to(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [
            fails(grpc.StatusCode.OUT_OF_RANGE, reason="POSITION_EXPIRED"),
            sends(bookmark(9), snapshot_begin(9), snapshot_page(9, ADA)),
            sends(bookmark(9), snapshot_end(9), events(10, 10), then_silent=True),
        ]
        cursor = MemoryCursor("old")
        feed = UserFeed(channel, cursor=cursor, snapshot_on=PositionExpiredError)
        batches = await take(feed, 4)
        assert [batch.snapshot for batch in batches] == ["begin", "within", "end", None]
        assert users.tokens() == ["old", None, "token-9-ada"]
        assert users.requests[1].WhichOneof("start") == "snapshot"
        assert cursor.token == token(9)

    async def test_in_the_middle_of_a_stream(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [
            fails(grpc.StatusCode.OUT_OF_RANGE, bookmark(0), events(1, 2), reason="POSITION_EXPIRED"),
            sends(bookmark(9), snapshot_begin(9), snapshot_end(9), events(10, 10), then_silent=True),
        ]
        batches = await take(UserFeed(channel, snapshot_on=(PositionExpiredError, ForeignTokenError)), 4)
        assert positions(batches) == [1, 2, 10]

    async def test_a_cursor_that_still_holds_the_refused_token_is_not_asked_again(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        class Stored(MemoryCursor):
            """What a transaction of the caller's stores, not the feed."""

            async def save(self, token: str) -> None:
                """Nothing."""

        cursor = Stored("old")
        users.scripts = [
            fails(grpc.StatusCode.FAILED_PRECONDITION, reason="DIVERGED_TOKEN"),
            fails(grpc.StatusCode.UNAVAILABLE),
            sends(bookmark(9)),
            sends(bookmark(9), snapshot_begin(9), snapshot_page(9, ADA)),
            sends(bookmark(9), snapshot_end(9), then_silent=True),
        ]
        parts = []
        async with contextlib.aclosing(aiter(UserFeed(channel, cursor=cursor, snapshot_on=LostPlaceError))) as batches:
            async for batch in batches:
                parts.append(batch.snapshot)
                cursor.token = batch.resume_token
                if batch.snapshot == "end":
                    break
        assert parts == ["begin", "within", "end"]
        assert users.tokens() == ["old", None, None, token(9), "token-9-ada"]
        assert [request.WhichOneof("start") for request in users.requests[1:3]] == ["snapshot", "snapshot"]

    @pytest.mark.parametrize(
        ("code", "reason", "on"),
        [
            (grpc.StatusCode.OUT_OF_RANGE, "POSITION_EXPIRED", ()),
            (grpc.StatusCode.FAILED_PRECONDITION, "FOREIGN_TOKEN", PositionExpiredError),
            (grpc.StatusCode.INVALID_ARGUMENT, "BAD_TOKEN", LostPlaceError),
            (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_MISMATCH", LostPlaceError),
        ],
    )
    async def test_what_was_not_asked_for_is_raised(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, code: grpc.StatusCode, reason: str, on: Any
    ) -> None:
        users.scripts = [fails(code, reason=reason)]
        with pytest.raises(Exception, match=f"it is {reason}"):
            await take(UserFeed(channel, cursor=MemoryCursor("old"), snapshot_on=on), 1)
        assert len(users.requests) == 1

    async def test_a_snapshot_that_is_refused_too_is_raised(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [fails(grpc.StatusCode.OUT_OF_RANGE, reason="POSITION_EXPIRED")]
        with pytest.raises(PositionExpiredError):
            await take(UserFeed(channel, cursor=MemoryCursor("old"), snapshot_on=LostPlaceError), 1)
        assert users.tokens() == ["old", None]


class TestSelections:
    async def test_reach_the_request(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1))]
        feed = UserFeed(
            channel,
            user_ids=["a", "b"],
            labels={"team": "engines"},
            types=[UserEvent.CREATED, UserEvent.DELETED],
            changed_fields={"email"},
            shard=(2, 8),
        )
        await take(feed, 1)
        request = users.requests[0]
        assert list(request.filter.user_ids) == ["a", "b"]
        assert dict(request.filter.labels) == {"team": "engines"}
        assert list(request.filter.types) == [UserEvent.CREATED, UserEvent.DELETED]
        assert list(request.filter.changed_fields) == ["email"]
        assert (request.shard.index, request.shard.count) == (2, 8)

    async def test_nothing_selected_is_nothing_sent(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1))]
        await take(UserFeed(channel), 1)
        assert not users.requests[0].HasField("filter")
        assert not users.requests[0].HasField("shard")

    @pytest.mark.parametrize("selection", [{"labels": {"team": "engines"}}, {"shard": (0, 2)}, {"user_ids": ["a"]}])
    async def test_holes_are_fine_and_the_chain_is_checked(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, selection: dict[str, Any]
    ) -> None:
        sparse = Response(
            events=[UserEvent(position=3), UserEvent(position=7)],
            resume_token=token(9),
            previous_position=0,
            position=9,
        )
        users.scripts = [sends(bookmark(0), sparse, bookmark(9), events(11, 11))]
        feed = UserFeed(channel, **selection)
        with pytest.raises(GapError, match="is 10, expected 9"):
            await take(feed, 2)

    @pytest.mark.parametrize("placed", [(3, 3), (7, 3), (10, 11), (3, 12)])
    async def test_events_rise_within_their_message(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, placed: tuple[int, int]
    ) -> None:
        some = [UserEvent(position=position) for position in placed]
        message = Response(events=some, resume_token="t", previous_position=2, position=10)
        users.scripts = [sends(bookmark(2), message)]
        with pytest.raises(GapError):
            await take(UserFeed(channel, shard=(0, 2)), 1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shard": (2, 2)}, "shard: 2 of 2"),
            ({"shard": (-1, 2)}, "shard: -1 of 2"),
            ({"shard": (0, 0)}, "shard: 0 of 0"),
            ({"user_ids": []}, "user_ids: must name at least one"),
            ({"user_ids": "ada"}, "user_ids: must name at least one"),
            ({"labels": {}}, "labels: must name at least one"),
            ({"types": [UserEvent.CREATED], "start": "snapshot"}, "a snapshot has none"),
            ({"changed_fields": ["email"], "snapshot_on": PositionExpiredError}, "a snapshot has none"),
        ],
    )
    async def test_bad_ones_are_refused_at_once(
        self, channel: grpc.aio.Channel, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            UserFeed(channel, **options)


class TestReplica:
    async def _copy(self, users: ScriptedUsers, channel: grpc.aio.Channel, *messages: Response) -> dict[str, int]:
        """Names and versions after all messages."""
        users.scripts = [sends(bookmark(5), *messages, then_silent=True)]
        replica = Replica()
        for batch in await take(UserFeed(channel, start="snapshot"), len(messages)):
            replica.apply(batch)
        assert replica.is_whole
        return {name: user.version for name, user in replica.users.items()}

    async def test_who_was_not_named_is_dropped(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        once = (snapshot_begin(5), snapshot_page(5, ADA, BEA), snapshot_end(5))
        again = (snapshot_begin(5), snapshot_page(5, BEA, CAL), snapshot_end(5))
        assert await self._copy(users, channel, *once, *again) == {"bea": 3, "cal": 3}

    async def test_a_snapshot_that_begins_anew_forgets_what_it_had_named(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        messages = (snapshot_begin(5), snapshot_page(5, ADA), snapshot_begin(5), snapshot_page(5, BEA), snapshot_end(5))
        assert await self._copy(users, channel, *messages) == {"bea": 3}

    async def test_changes_that_a_page_already_held_are_left_out(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        snapshot = (snapshot_begin(5), snapshot_page(5, ADA, BEA), snapshot_end(5))
        older = User(id="ada", version=2)
        changes = (
            change(6, older),
            change(7, older, UserEvent.DELETED),
            change(8, older, left_filter=True),
            change(9, User(id="bea", version=4), left_filter=True),
            change(10, User(id="cal", version=1), UserEvent.CREATED),
            change(11, User(id="dee", version=9), UserEvent.DELETED),
        )
        assert await self._copy(users, channel, *snapshot, *changes) == {"ada": 3, "cal": 1}

    async def test_the_rest_of_a_snapshot_is_refused(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(5), snapshot_page(5, BEA), then_silent=True)]
        [batch] = await take(UserFeed(channel, cursor=MemoryCursor("token-5-ada")), 1)
        with pytest.raises(ValueError, match="whose beginning was not applied"):
            Replica().apply(batch)

    @pytest.mark.parametrize("seed", range(24))
    async def test_the_copy_equals_the_table(self, users: ScriptedUsers, channel: grpc.aio.Channel, seed: int) -> None:
        """Whatever changes and breaks meanwhile."""
        model, replica = Model(seed), Replica()
        selections: list[dict[str, Any]] = [{}, {"labels": {"team": "engines"}}, {"shard": (seed % 2, 2)}]
        model.expires = 0.1 if seed % 2 else 0.0
        users.scripts = [model.watch]
        feed = UserFeed(
            channel, start="snapshot", snapshot_on=PositionExpiredError, progress=True, **selections[seed % 3]
        )
        await _follow(feed, replica, model)
        assert replica.is_whole
        assert replica.users == model.living(users.requests[0])
        assert len(model.starts) > 1

    async def test_a_copy_of_another_history_becomes_one_of_this(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        model, replica, cursor = Model(1, changes_left=20), Replica(), MemoryCursor()
        users.scripts = [model.watch]
        options: dict[str, Any] = {"snapshot_on": LostPlaceError, "progress": True, "cursor": cursor}
        await _follow(UserFeed(channel, start="snapshot", **options), replica, model)
        model.begin_another_history()
        await _follow(UserFeed(channel, start="snapshot", **options), replica, model)
        assert replica.users == model.living(users.requests[0])
        assert {user.labels["team"] for user in replica.users.values()} == {"restored"}


async def _follow(feed: UserFeed, replica: Replica, model: Model) -> None:
    """Applies batches until there is nothing more. Within a history no user of the copy may become older."""
    seen: dict[str, int] = {}
    async with contextlib.aclosing(aiter(feed)) as batches:
        async for batch in batches:
            replica.apply(batch)
            versions = {user_id: user.version for user_id, user in replica.users.items()}
            assert model.log == "another" or all(
                version >= seen.get(user_id, 0) for user_id, version in versions.items()
            )
            seen |= versions
            if batch.caught_up and not model.changes_left:
                break
