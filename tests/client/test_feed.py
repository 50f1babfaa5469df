"""What UserFeed promises: nothing missing, nothing twice, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone

import grpc
import grpc.aio
import pytest

from tests.client.conftest import (
    Context,
    Response,
    Script,
    ScriptedUsers,
    bookmark,
    caught_up,
    drain,
    events,
    fails,
    positions,
    sends,
    take,
    token,
)
from tidings.client import (
    BadTokenError,
    DivergedTokenError,
    FeedRefusedError,
    ForeignTokenError,
    FutureTokenError,
    GapError,
    MemoryCursor,
    PositionExpiredError,
    ProtocolError,
    TokenMismatchError,
    UserFeed,
    connect,
)
from tidings.users.v1 import users_pb2


class TestResuming:
    async def test_goes_on_after_the_last_token_when_the_stream_ends(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [
            sends(bookmark(0), events(1, 2), events(3, 3)),
            sends(bookmark(3), events(4, 5)),
            sends(bookmark(5), then_silent=True),
        ]
        assert positions(await take(UserFeed(channel), 3)) == [1, 2, 3, 4, 5]
        assert users.tokens() == [None, token(3)]

    @pytest.mark.parametrize(
        "code",
        [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN],
    )
    async def test_reconnects_when_the_server_fails(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, code: grpc.StatusCode
    ) -> None:
        users.scripts = [fails(code), fails(code, bookmark(0), events(1, 1)), sends(bookmark(1), events(2, 2))]
        assert positions(await take(UserFeed(channel), 2)) == [1, 2]
        assert users.tokens() == [None, None, token(1)]

    async def test_survives_the_end_of_the_server(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1), then_silent=True), sends(bookmark(1), events(2, 2))]
        batches = aiter(UserFeed(channel))
        assert (await anext(batches)).position == 1
        waiting = asyncio.create_task(anext(batches))
        await asyncio.sleep(0.05)
        await users.stop()
        await asyncio.sleep(0.3)
        await users.start()
        assert (await waiting).position == 2
        assert users.tokens() == [None, token(1)]
        await batches.aclose()

    async def test_a_batch_that_was_not_processed_comes_again(
        self, users: ScriptedUsers, channel: grpc.aio.Channel
    ) -> None:
        users.scripts = [
            sends(bookmark(0), events(1, 1), events(2, 2), then_silent=True),
            sends(bookmark(1), events(2, 2), then_silent=True),
        ]
        cursor = MemoryCursor()
        feed = UserFeed(channel, cursor=cursor)
        assert positions(await take(feed, 2)) == [1, 2]
        assert cursor.token == token(1)
        assert positions(await take(feed, 1)) == [2]
        assert users.tokens() == [None, token(1)]

    async def test_the_cursor_decides_at_each_connection(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        class Elsewhere(MemoryCursor):
            """A cursor that others move."""

            async def save(self, token: str) -> None:
                """The transaction that stored the events has done it."""

        cursor = Elsewhere(token(7))
        users.scripts = [sends(bookmark(7), events(8, 8)), sends(bookmark(9), events(10, 10))]
        batches = aiter(UserFeed(channel, cursor=cursor))
        assert (await anext(batches)).position == 8
        cursor.token = token(9)
        assert (await anext(batches)).position == 10
        assert users.tokens() == [token(7), token(9)]
        await batches.aclose()

    async def test_now_is_said_once(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(4)), sends(bookmark(4), events(5, 5), then_silent=True)]
        cursor = MemoryCursor()
        assert positions(await take(UserFeed(channel, start="now", cursor=cursor), 1)) == [5]
        assert [request.WhichOneof("start") for request in users.requests] == ["now", "resume_token"]
        assert cursor.token == token(4)

    async def test_drain_is_respected(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, pauses: list[float]
    ) -> None:
        users.scripts = [
            sends(bookmark(0), events(1, 1), drain(1, after=400), then_silent=True),
            sends(bookmark(1), events(2, 2)),
        ]
        assert positions(await take(UserFeed(channel), 2)) == [1, 2]
        assert users.tokens() == [None, token(1)]
        assert 400 <= pauses[0] < 401

    async def test_options_reach_the_request(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1))]
        await take(UserFeed(channel, include_previous=True, bookmark_interval=2.5, max_batch=7), 1)
        request = users.requests[0]
        assert request.include_previous
        assert request.max_batch == 7
        assert request.bookmark_interval.ToMilliseconds() == 2500

    async def test_a_time_to_start_at_needs_a_zone(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1))]
        noon = datetime(2026, 5, 4, 14, tzinfo=timezone(timedelta(hours=2)))
        await take(UserFeed(channel, start=noon, linger=0.25), 1)
        assert users.requests[0].since.ToJsonString() == "2026-05-04T12:00:00Z"
        assert users.requests[0].linger.ToMilliseconds() == 250
        with pytest.raises(ValueError, match="no time zone"):
            UserFeed(channel, start=noon.replace(tzinfo=None))


class TestBatches:
    async def test_a_group_is_never_split(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 2, inside_group=True), events(3, 4), events(5, 5))]
        first, second = await take(UserFeed(channel), 2)
        assert positions([first]) == [1, 2, 3, 4]
        assert (first.previous_position, first.position, first.resume_token) == (0, 4, token(4))
        assert (second.previous_position, second.position) == (4, 5)

    async def test_a_group_that_breaks_off_begins_anew(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [
            fails(grpc.StatusCode.UNAVAILABLE, bookmark(0), events(1, 1), events(2, 3, inside_group=True)),
            sends(bookmark(1), events(2, 3, inside_group=True), events(4, 4)),
        ]
        batches = await take(UserFeed(channel), 2)
        assert [positions([batch]) for batch in batches] == [[1], [2, 3, 4]]

    async def test_progress_is_told_if_asked_for(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [
            sends(bookmark(0, head=9), events(1, 1), caught_up(1), events(2, 2), bookmark(2, head=2), then_silent=True)
        ]
        batches = await take(UserFeed(channel, progress=True), 5)
        assert [(batch.position, batch.head_position, batch.caught_up, len(batch.events)) for batch in batches] == [
            (0, 9, False, 0),
            (1, 9, False, 1),
            (1, 9, True, 0),
            (2, 9, True, 1),
            (2, 2, True, 0),
        ]
        assert batches[0].head_time == datetime.fromtimestamp(1_700_000_000, UTC)

    async def test_the_head_is_never_behind_the_position(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 3))]
        assert (await take(UserFeed(channel), 1))[0].head_position == 3


class TestChecks:
    @pytest.mark.parametrize(
        ("messages", "expected", "got"),
        [
            ([bookmark(0), events(1, 2), events(4, 5)], 2, 3),
            ([bookmark(0), events(1, 2), events(2, 3)], 2, 1),
            ([bookmark(0), Response(events=[users_pb2.UserEvent(position=2)], resume_token="t", position=2)], 1, 2),
            ([bookmark(0), Response(events=[users_pb2.UserEvent(position=1)], resume_token="t", position=2)], 1, 2),
            ([bookmark(0), Response(resume_token="t", previous_position=0, position=3)], 0, 3),
        ],
    )
    async def test_a_gap_is_an_error(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, messages: list[Response], expected: int, got: int
    ) -> None:
        users.scripts = [sends(*messages, then_silent=True)]
        with pytest.raises(GapError) as caught:
            await take(UserFeed(channel), 5)
        assert (caught.value.expected, caught.value.got) == (expected, got)

    async def test_a_gap_over_a_reconnect_is_an_error(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 2)), sends(bookmark(3), events(4, 4))]
        with pytest.raises(GapError, match=r"is 3, expected 2"):
            await take(UserFeed(channel), 5)

    async def test_the_first_message_must_be_a_bookmark(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(events(1, 1))]
        with pytest.raises(ProtocolError):
            await take(UserFeed(channel), 1)

    @pytest.mark.parametrize(
        ("code", "reason", "expected"),
        [
            (grpc.StatusCode.OUT_OF_RANGE, "POSITION_EXPIRED", PositionExpiredError),
            (grpc.StatusCode.FAILED_PRECONDITION, "FOREIGN_TOKEN", ForeignTokenError),
            (grpc.StatusCode.FAILED_PRECONDITION, "DIVERGED_TOKEN", DivergedTokenError),
            (grpc.StatusCode.FAILED_PRECONDITION, "FUTURE_TOKEN", FutureTokenError),
            (grpc.StatusCode.INVALID_ARGUMENT, "BAD_TOKEN", BadTokenError),
            (grpc.StatusCode.INVALID_ARGUMENT, "TOKEN_MISMATCH", TokenMismatchError),
            (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", FeedRefusedError),
            (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED", FeedRefusedError),
        ],
    )
    async def test_refusals_have_types(
        self,
        users: ScriptedUsers,
        channel: grpc.aio.Channel,
        code: grpc.StatusCode,
        reason: str,
        expected: type[FeedRefusedError],
    ) -> None:
        users.scripts = [fails(code, reason=reason, metadata={"earliest_position": "12"})]
        with pytest.raises(FeedRefusedError) as caught:
            await take(UserFeed(channel, cursor=MemoryCursor("old")), 1)
        assert type(caught.value) is expected
        assert caught.value.error.reason == reason
        if isinstance(caught.value, PositionExpiredError):
            assert caught.value.earliest_position == 12


class TestWatchdog:
    async def test_three_intervals_of_silence_are_a_dead_connection(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
    ) -> None:
        users.scripts = [
            sends(bookmark(0), events(1, 1), then_silent=True),
            sends(bookmark(1), events(2, 2), then_silent=True),
        ]
        assert positions(await take(UserFeed(channel, bookmark_interval=0.1), 2)) == [1, 2]
        assert "no message for 0.3 s" in caplog.text

    async def test_a_slow_reader_is_not_silence(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1), events(2, 2), then_silent=True)]
        feed = aiter(UserFeed(channel, bookmark_interval=0.05))
        assert (await anext(feed)).position == 1
        await asyncio.sleep(0.4)
        assert (await anext(feed)).position == 2
        assert len(users.requests) == 1
        await feed.aclose()

    async def test_bookmarks_keep_the_connection(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        async def script(request: users_pb2.WatchUsersRequest, context: Context) -> AsyncIterator[Response]:
            for _ in range(8):
                yield bookmark(0)
                await asyncio.sleep(0.1)
            yield events(1, 1)

        users.scripts = [script]
        assert positions(await take(UserFeed(channel, bookmark_interval=0.1), 1)) == [1]
        assert len(users.requests) == 1


def client_tasks() -> set[asyncio.Task[object]]:
    """All tasks but those of the server in the same loop."""
    return {task for task in asyncio.all_tasks() if "AioServer" not in repr(task)}


class TestEnding:
    async def _nothing_left(self, users: ScriptedUsers, before: set[asyncio.Task[object]]) -> None:
        async with asyncio.timeout(2):
            while users.running or client_tasks() - before:
                await asyncio.sleep(0.01)

    @pytest.mark.parametrize("script", [sends(bookmark(0), then_silent=True), sends(then_silent=True)])
    async def test_cancelling_the_reader_leaves_nothing(
        self, users: ScriptedUsers, channel: grpc.aio.Channel, script: Script
    ) -> None:
        users.scripts = [script]
        await channel.channel_ready()
        before = client_tasks()
        reading = asyncio.create_task(take(UserFeed(channel), 1))
        while not users.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await self._nothing_left(users, before)
        assert len(users.requests) == 1

    async def test_a_timeout_around_the_reader_works(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), then_silent=True)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await take(UserFeed(channel, bookmark_interval=10), 1)

    async def test_closing_ends_the_call(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1), then_silent=True)]
        await channel.channel_ready()
        before = client_tasks()
        batches = aiter(UserFeed(channel))
        await anext(batches)
        await batches.aclose()
        await self._nothing_left(users, before)

    async def test_leaving_the_loop_ends_the_call(self, users: ScriptedUsers, channel: grpc.aio.Channel) -> None:
        users.scripts = [sends(bookmark(0), events(1, 1), then_silent=True)]
        await channel.channel_ready()
        before = client_tasks()
        async for _ in UserFeed(channel):
            break
        await self._nothing_left(users, before)

    async def test_cancelling_while_nobody_listens(self, users: ScriptedUsers) -> None:
        await users.stop()
        async with connect(users.address) as channel:
            reading = asyncio.create_task(take(UserFeed(channel), 1))
            await asyncio.sleep(0.3)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
