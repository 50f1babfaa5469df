"""Users: request ids, retries, deadlines, pages, and errors that say what is wrong."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

from tests.client.conftest import Context, ScriptedUsers, abort
from tidings.client import ApiError, Users
from tidings.users.v1 import users_pb2


class Directory(ScriptedUsers):
    """Refuses the first creations as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[users_pb2.CreateUserRequest] = []
        self.refusals: list[grpc.StatusCode] = []
        self.slow = 0.0
        self.pages: list[users_pb2.ListUsersRequest] = []

    async def CreateUser(self, request: users_pb2.CreateUserRequest, context: Context) -> users_pb2.User:
        """Refuses or echoes."""
        self.created.append(request)
        await asyncio.sleep(self.slow)
        if self.refusals:
            violations = [error_details_pb2.BadRequest.FieldViolation(field="user.email", description="must be so")]
            more = (
                error_details_pb2.BadRequest(field_violations=violations),
                error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
            )
            await abort(context, self.refusals.pop(0), "NO", {"key": "value"}, more)
        return request.user

    async def ListUsers(self, request: users_pb2.ListUsersRequest, context: Context) -> users_pb2.ListUsersResponse:
        """Three pages of two."""
        self.pages.append(request)
        page = int(request.page_token or 0)
        return users_pb2.ListUsersResponse(
            users=[users_pb2.User(id=str(2 * page + one)) for one in range(2)],
            next_page_token=str(page + 1) if page < 2 else "",
        )


@pytest.fixture
async def users() -> object:
    """Takes the place of the scripted server."""
    made = Directory()  # type: ignore[abstract]
    await made.start()
    yield made
    await made.stop()


async def test_an_unavailable_server_is_asked_again_with_the_same_request_id(
    users: Directory, channel: grpc.aio.Channel
) -> None:
    users.refusals = [grpc.StatusCode.UNAVAILABLE] * 2
    assert (await Users(channel).create(users_pb2.User(username="ada"))).username == "ada"
    assert len(users.created) == 3
    assert len({request.request_id for request in users.created}) == 1
    assert uuid.UUID(users.created[0].request_id).version == 4


async def test_a_refusal_is_not_repeated_and_says_why(users: Directory, channel: grpc.aio.Channel) -> None:
    users.refusals = [grpc.StatusCode.INVALID_ARGUMENT]
    with pytest.raises(ApiError, match="it is NO") as caught:
        await Users(channel).create(users_pb2.User(), request_id="mine")
    error = caught.value
    assert (error.code, error.reason, error.metadata) == (grpc.StatusCode.INVALID_ARGUMENT, "NO", {"key": "value"})
    assert error.violations == (("user.email", "must be so"),)
    assert error.retry_after == 1.5
    assert [request.request_id for request in users.created] == ["mine"]


async def test_a_call_has_a_deadline(users: Directory, channel: grpc.aio.Channel) -> None:
    users.slow = 1.0
    with pytest.raises(ApiError) as caught:
        await Users(channel, timeout=0.1).create(users_pb2.User())
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.is_temporary


async def test_nobody_listens(users: Directory, channel: grpc.aio.Channel) -> None:
    await users.stop()
    with pytest.raises(ApiError) as caught:
        await Users(channel).create(users_pb2.User())
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.reason == "UNAVAILABLE"


async def test_lists_go_over_all_pages(users: Directory, channel: grpc.aio.Channel) -> None:
    listed = [user.id async for user in Users(channel).list(username_prefix="a", page_size=2)]
    assert listed == ["0", "1", "2", "3", "4", "5"]
    assert [request.page_token for request in users.pages] == ["", "1", "2"]
    assert {request.filter.username_prefix for request in users.pages} == {"a"}
