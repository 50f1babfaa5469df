"""The directory of users: its unary methods with deadlines, request ids and typed errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence

import grpc.aio
from google.protobuf import field_mask_pb2

from tidings.client.imports import Import, Imported, ImportProgress
from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, new_request_id, pages
from tidings.users.v1 import users_pb2, users_pb2_grpc


class Users:
    """Calls UserService. `timeout` bounds each unary call, in seconds. Every method raises ApiError.

    Each mutation carries a request_id, a new one unless the caller gives one. Give one to be able to repeat the call
    after its outcome got lost, in another process too: within 24 hours a repetition returns the first answer.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = users_pb2_grpc.UserServiceStub(channel)
        self._timeout = timeout

    async def create(
        self, user: users_pb2.User, *, request_id: str | None = None, validate_only: bool = False
    ) -> users_pb2.User:
        """Creates a user."""
        request = users_pb2.CreateUserRequest(
            user=user, request_id=request_id or new_request_id(), validate_only=validate_only
        )
        return await answer(self._stub.CreateUser(request, timeout=self._timeout))

    async def create_batch(
        self, users: Iterable[users_pb2.User], *, request_ids: Sequence[str] | None = None
    ) -> tuple[users_pb2.User, ...]:
        """Creates up to 1,000 users, all or none; one request_id for each user, in the same order."""
        users = tuple(users)
        ids = request_ids or [new_request_id() for _ in users]
        requests = [
            users_pb2.CreateUserRequest(user=user, request_id=request_id)
            for user, request_id in zip(users, ids, strict=True)
        ]
        request = users_pb2.BatchCreateUsersRequest(requests=requests)
        return tuple((await answer(self._stub.BatchCreateUsers(request, timeout=self._timeout))).users)

    def import_users(
        self, source: AsyncIterable[Imported] | Iterable[Imported], *, retry_for: float = 60.0
    ) -> AsyncGenerator[ImportProgress, None]:
        """Creates users in bulk, each on its own, from pairs of a user and a request_id (None: a new one).

        Yields progress as users are decided, in the order of the source; of users that want the same name the first
        wins. The source is read as fast as the server decides and the progress is taken. A server that goes away is
        tried again, and undecided users are sent again with their request_ids, for `retry_for` seconds without
        progress; then the ApiError is raised.
        """
        return Import(source, self._stub.ImportUsers, retry_for=retry_for).run()

    async def get(self, user_id: str) -> users_pb2.User:
        """A user, a soft-deleted one too."""
        return await answer(self._stub.GetUser(users_pb2.GetUserRequest(id=user_id), timeout=self._timeout))

    async def get_batch(self, user_ids: Iterable[str]) -> tuple[users_pb2.User, ...]:
        """Up to 1,000 users in the order of the ids."""
        request = users_pb2.BatchGetUsersRequest(ids=user_ids)
        return tuple((await answer(self._stub.BatchGetUsers(request, timeout=self._timeout))).users)

    async def list(
        self,
        *,
        username_prefix: str = "",
        email_prefix: str = "",
        show_deleted: bool = False,
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[users_pb2.User, None]:
        """Users in the order of their creation; pages are fetched as they are needed."""
        request = users_pb2.ListUsersRequest(page_size=page_size, show_deleted=show_deleted)
        if username_prefix or email_prefix:
            request.filter.username_prefix = username_prefix
            request.filter.email_prefix = email_prefix
        async for page in pages(self._stub.ListUsers, request, self._timeout):
            for user in page.users:
                yield user

    async def update(
        self, user: users_pb2.User, fields: Iterable[str], *, request_id: str | None = None
    ) -> users_pb2.User:
        """Changes the named fields to what `user` has; with `user.version` set only if that is the current version."""
        request = users_pb2.UpdateUserRequest(
            user=user,
            update_mask=field_mask_pb2.FieldMask(paths=fields),
            request_id=request_id or new_request_id(),
        )
        return await answer(self._stub.UpdateUser(request, timeout=self._timeout))

    async def delete(self, user_id: str, *, version: int = 0, request_id: str | None = None) -> users_pb2.User:
        """Deletes a user softly; with a version only if that is the current one."""
        request = users_pb2.DeleteUserRequest(id=user_id, version=version, request_id=request_id or new_request_id())
        return await answer(self._stub.DeleteUser(request, timeout=self._timeout))

    async def undelete(self, user_id: str, *, request_id: str | None = None) -> users_pb2.User:
        """Takes a soft deletion back."""
        request = users_pb2.UndeleteUserRequest(id=user_id, request_id=request_id or new_request_id())
        return await answer(self._stub.UndeleteUser(request, timeout=self._timeout))

    async def feed(self) -> users_pb2.Feed:
        """The state of the feed: its identity, its first retained position and its head."""
        return await answer(self._stub.GetFeed(users_pb2.GetFeedRequest(), timeout=self._timeout))
