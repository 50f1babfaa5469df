"""Ways to talk to a user service, and to read what it answers."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.harness import ServiceProcess
from tidings.users.v1 import users_pb2, users_pb2_grpc

if TYPE_CHECKING:
    Stub = users_pb2_grpc.UserServiceAsyncStub
else:
    Stub = users_pb2_grpc.UserServiceStub

_numbers = itertools.count(1)


def user(**fields: object) -> users_pb2.User:
    """A valid user that no other call makes."""
    number = next(_numbers)
    given = {"username": f"user-{number}", "email": f"user-{number}@example.com", **fields}
    return users_pb2.User(**given)


def create(request_id: str | None = None, **fields: object) -> users_pb2.CreateUserRequest:
    """A request to create such a user, with a request_id of its own unless one is given."""
    return users_pb2.CreateUserRequest(
        user=user(**fields), request_id=str(uuid.uuid4()) if request_id is None else request_id
    )


@dataclass(frozen=True)
class Refusal:
    """What a refused call says."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    fields: list[str]
    message: str


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the details of an error."""
    status = rpc_status.from_call(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details if status else ():
        detail.Unpack(info)
        detail.Unpack(bad)
    fields = [violation.field for violation in bad.field_violations]
    return Refusal(error.code(), info.reason, dict(info.metadata), fields, error.details() or "")


async def refused(call: object) -> Refusal:
    """Awaits a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return refusal(caught.value)


def stub_of(service: ServiceProcess, *options: tuple[str, int]) -> Stub:
    """A stub on a channel of its own, with further options; closed with the event loop."""
    channel = grpc.aio.insecure_channel(
        service.address,
        options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *options],
    )
    return Stub(channel)


async def read(stream: Any) -> users_pb2.WatchUsersResponse:
    """The next message of a stream that goes on."""
    message = await stream.read()
    assert isinstance(message, users_pb2.WatchUsersResponse), "the stream ended"
    return message


async def replay(stub: Stub, token: str = "", **fields: object) -> list[users_pb2.UserEvent]:
    """All events from the earliest, or after a token, up to the head; nothing may be missing between messages."""
    start: dict[str, object] = {"resume_token": token} if token else {"earliest": {}}
    stream = stub.WatchUsers(users_pb2.WatchUsersRequest(**start, **fields))
    events: list[users_pb2.UserEvent] = []
    position = None
    async for message in stream:
        if position is None:
            assert message.HasField("bookmark")
            assert message.resume_token
            position = message.position
        assert message.previous_position == position
        for event in message.events:
            position += 1
            assert event.position == position
            events.append(event)
        assert message.position == position
        if message.HasField("caught_up"):
            stream.cancel()
            return events
    raise AssertionError("the stream ended")


async def follow(stub: Stub, **fields: object) -> list[users_pb2.WatchUsersResponse]:
    """All messages of a stream up to caught_up. The first is a bookmark with a token, and each goes on where the one
    before it ended, whatever the stream selects.
    """
    stream = stub.WatchUsers(users_pb2.WatchUsersRequest(**fields))
    messages: list[users_pb2.WatchUsersResponse] = []
    async for message in stream:
        if messages:
            assert message.previous_position == messages[-1].position
        else:
            assert message.HasField("bookmark")
            assert message.resume_token
        assert message.position >= message.previous_position
        for event in message.events:
            assert event.type == event.SNAPSHOT or message.previous_position < event.position <= message.position
        messages.append(message)
        if message.HasField("caught_up"):
            stream.cancel()
            return messages
    raise AssertionError("the stream ended")


def events_of(messages: Iterable[users_pb2.WatchUsersResponse]) -> list[users_pb2.UserEvent]:
    """The events of messages."""
    return [event for message in messages for event in message.events]


async def interval_passes(stub: Stub) -> None:
    """A second passes on the clock of a service whose feed rests: an idle stream is due for a bookmark."""
    stream = stub.WatchUsers(users_pb2.WatchUsersRequest(now={}, bookmark_interval={"seconds": 1}))
    marks = [(await read(stream)).WhichOneof("mark") for _ in range(3)]
    stream.cancel()
    assert marks == ["bookmark", "caught_up", "bookmark"]


@dataclass(frozen=True)
class Log:
    """The feed from a place on."""

    stub: Stub
    token: str
    position: int

    async def events(self, **fields: object) -> list[users_pb2.UserEvent]:
        """All events since."""
        return await replay(self.stub, self.token, **fields)
