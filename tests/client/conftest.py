"""A server that plays scripts, and the messages they are made of; a user service that is real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tests.harness import PostgresServer, ServiceProcess, Services
from tidings.client import Batch, UserFeed, connect, follow
from tidings.users.v1 import users_pb2, users_pb2_grpc

Response = users_pb2.WatchUsersResponse
Context = grpc.aio.ServicerContext[Any, Any]
# What one call of WatchUsers does.
Script = Callable[[users_pb2.WatchUsersRequest, Context], AsyncIterator[Response]]


def token(position: int) -> str:
    """The token of a position."""
    return f"token-{position}"


def bookmark(position: int, *, head: int | None = None, resume: str | None = None) -> Response:
    """A message without events."""
    mark = Response.Bookmark(
        head_position=position if head is None else head, head_time=timestamp_pb2.Timestamp(seconds=1_700_000_000)
    )
    return Response(
        resume_token=token(position) if resume is None else resume,
        previous_position=position,
        position=position,
        bookmark=mark,
    )


def events(first: int, last: int, *, inside_group: bool = False) -> Response:
    """The events of two positions and those between."""
    return Response(
        events=[users_pb2.UserEvent(position=position) for position in range(first, last + 1)],
        resume_token="" if inside_group else token(last),
        previous_position=first - 1,
        position=last,
    )


def caught_up(position: int) -> Response:
    """From here the stream is live."""
    return Response(
        resume_token=token(position),
        previous_position=position,
        position=position,
        caught_up=Response.CaughtUp(position=position),
    )


def snapshot_begin(position: int, *, after: int | None = None) -> Response:
    """A snapshot begins; the message before it may have ended earlier."""
    return Response(
        resume_token=f"{token(position)}-begin",
        previous_position=position if after is None else after,
        position=position,
        snapshot_begin=Response.SnapshotBegin(position=position),
    )


def snapshot_page(position: int, *users: users_pb2.User) -> Response:
    """Users of a snapshot."""
    kind = users_pb2.UserEvent.SNAPSHOT
    return Response(
        events=[users_pb2.UserEvent(position=position, type=kind, user=user) for user in users],
        resume_token=f"{token(position)}-{users[-1].id}",
        previous_position=position,
        position=position,
    )


def snapshot_end(position: int) -> Response:
    """A snapshot ends."""
    return Response(
        resume_token=token(position),
        previous_position=position,
        position=position,
        snapshot_end=Response.SnapshotEnd(position=position),
    )


def drain(position: int, after: float) -> Response:
    """The server wants to be left alone."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(after * 1e9))
    return Response(
        resume_token=token(position),
        previous_position=position,
        position=position,
        drain=Response.Drain(reason="test", reconnect_after=delay),
    )


def sends(*messages: Response, then_silent: bool = False) -> Script:
    """Sends messages and ends with OK, or stays silent until the client has gone."""

    async def script(request: users_pb2.WatchUsersRequest, context: Context) -> AsyncIterator[Response]:
        for message in messages:
            yield message
        if then_silent:
            await asyncio.Event().wait()

    return script


def fails(
    code: grpc.StatusCode, *messages: Response, reason: str = "", metadata: dict[str, str] | None = None
) -> Script:
    """Sends messages and ends with an error as the services make them."""

    async def script(request: users_pb2.WatchUsersRequest, context: Context) -> AsyncIterator[Response]:
        for message in messages:
            yield message
        await abort(context, code, reason, metadata)

    return script


async def abort(
    context: Context,
    code: grpc.StatusCode,
    reason: str = "",
    metadata: dict[str, str] | None = None,
    more: Sequence[Any] = (),
) -> None:
    """Ends a call with details."""
    details = []
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain="tidings", metadata=metadata), *more):
        box = any_pb2.Any()
        box.Pack(detail)
        details.append(box)
    status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=f"it is {reason}", details=details))
    await context.abort(status.code, status.details, status.trailing_metadata)


async def take(feed: UserFeed, count: int) -> list[Batch]:
    """The first batches; all but the last are processed."""
    taken = []
    async with contextlib.aclosing(aiter(feed)) as batches:
        async for batch in batches:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


def positions(batches: list[Batch]) -> list[int]:
    """The positions of all events."""
    return [event.position for batch in batches for event in batch.events]


class ScriptedUsers(users_pb2_grpc.UserServiceServicer):
    """Plays one script per call of WatchUsers, the last one for every further call; remembers requests and cancels."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.requests: list[users_pb2.WatchUsersRequest] = []
        self.running = 0
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listens, again where it did before."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        users_pb2_grpc.add_UserServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Breaks every connection."""
        if self._server is not None:
            await self._server.stop(None)

    async def WatchUsers(self, request: users_pb2.WatchUsersRequest, context: Context) -> AsyncIterator[Response]:
        """Plays the next script."""
        self.requests.append(request)
        script = self.scripts[0] if len(self.scripts) == 1 else self.scripts.pop(0)
        self.running += 1
        try:
            async for message in script(request, context):
                yield message
        finally:
            self.running -= 1

    def tokens(self) -> list[str | None]:
        """The token of each call so far, None where it began without."""
        return [
            request.resume_token if request.WhichOneof("start") == "resume_token" else None for request in self.requests
        ]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long feeds were to wait before they connected again; they did not."""
    asked: list[float] = []

    async def pause(seconds: float) -> None:
        asked.append(seconds)
        await asyncio.sleep(min(seconds, 0.01))

    monkeypatch.setattr(follow, "sleep", pause)
    return asked


@pytest.fixture
async def users() -> AsyncIterator[ScriptedUsers]:
    """A listening server without scripts."""
    made = ScriptedUsers()  # type: ignore[abstract] # methods without a script answer UNIMPLEMENTED
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def channel(users: ScriptedUsers) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to it."""
    async with connect(users.address) as opened:
        yield opened


@pytest.fixture(scope="module")
async def real(postgres: PostgresServer) -> AsyncIterator[ServiceProcess]:
    """A user service for a whole module."""
    database, services = await postgres.users_database(), Services()
    yield await services.users(database).start()
    await services.stop()
    await postgres.drop(database)
