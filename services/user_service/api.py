"""UserService as callers see it: checks a request, asks the writer, the reads or the streams, and answers.

Mutations and streams answer with bytes, registered without a serializer (`RAW_RESPONSES`): what the writer stored for a
retry is what the first caller gets. The generated types know messages only, hence the ignored overrides.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import psycopg

from servicekit import callers, rpc, telemetry, tracing
from servicekit.database import Connection, Pool
from servicekit.errors import NotFoundError, Violation, invalid
from tidings.users.v1 import users_pb2, users_pb2_grpc
from user_service import creation, domain, errors, events, reads, tokens, validation, watch_request
from user_service.domain import Item, Mutation, Unit
from user_service.imports import Imports
from user_service.watch import Streams
from user_service.writer import Writer

_Context = grpc.aio.ServicerContext[Any, Any]

# Methods that answer with encoded messages.
RAW_RESPONSES = (
    "CreateUser",
    "UpdateUser",
    "DeleteUser",
    "UndeleteUser",
    "BatchCreateUsers",
    "WatchUsers",
)

_NIL = uuid.UUID(int=0)


class UserService(users_pb2_grpc.UserServiceServicer):
    """The servicer."""

    def __init__(self, writer: Writer, pool: Pool, streams: Streams, imports: Imports) -> None:
        self._writer = writer
        self._pool = pool
        self._streams = streams
        self._imports = imports

    # Changes

    async def CreateUser(self, request: users_pb2.CreateUserRequest, context: _Context) -> bytes:  # type: ignore[override]
        violations: validation.Violations = []
        item = creation.item(request, "", violations)
        if violations:
            raise invalid(*violations)
        return (await self._submit((item,), "CreateUser", context, validate_only=request.validate_only))[0]

    async def UpdateUser(self, request: users_pb2.UpdateUserRequest, context: _Context) -> bytes:  # type: ignore[override]
        user_id = validation.user_id(request.user.id, "user.id")
        fields = validation.mask(list(request.update_mask.paths))
        violations: validation.Violations = []
        email_key = validation.check(request.user, dict(request.user.labels), fields, "user", violations)
        mutation = domain.Update(user_id, request.user, fields, email_key, request.user.version)
        return await self._change(mutation, request, "UpdateUser", context, violations)

    async def DeleteUser(self, request: users_pb2.DeleteUserRequest, context: _Context) -> bytes:  # type: ignore[override]
        mutation = domain.Delete(validation.user_id(request.id, "id"), request.version)
        return await self._change(mutation, request, "DeleteUser", context, [])

    async def UndeleteUser(self, request: users_pb2.UndeleteUserRequest, context: _Context) -> bytes:  # type: ignore[override]
        mutation = domain.Undelete(validation.user_id(request.id, "id"))
        return await self._change(mutation, request, "UndeleteUser", context, [])

    async def BatchCreateUsers(self, request: users_pb2.BatchCreateUsersRequest, context: _Context) -> bytes:  # type: ignore[override]
        requests = request.requests
        if not 1 <= len(requests) <= validation.MOST_IN_BATCH:
            raise invalid(Violation("requests", f"must be 1 to {validation.MOST_IN_BATCH}"))
        violations: validation.Violations = []
        validate_only = requests[0].validate_only
        seen: set[bytes] = set()
        items = []
        for index, one in enumerate(requests):
            prefix = f"requests[{index}]."
            item = creation.item(one, prefix, violations)
            if one.validate_only != validate_only:
                violations.append(Violation(f"{prefix}validate_only", "must be the same in all requests"))
            if item.request_id is not None:
                if item.request_id in seen:
                    violations.append(Violation(f"{prefix}request_id", "is that of an earlier request of this batch"))
                seen.add(item.request_id)
            items.append(item)
        if seen and len(seen) < len(items) and not violations:
            violations.append(Violation("requests", "must have a request_id each, or none of them"))
        if violations:
            raise invalid(*violations)
        users = await self._submit(tuple(items), "BatchCreateUsers", context, validate_only=validate_only)
        return b"".join(events.element(user) for user in users)  # users is field 1

    async def ImportUsers(
        self, request_iterator: AsyncIterator[users_pb2.ImportUsersRequest], context: _Context
    ) -> AsyncIterator[users_pb2.ImportUsersResponse]:
        trace_parent, trace_state = tracing.incoming(context)
        if telemetry.enabled():
            # Each of its events is the root of a trace of its own.
            trace_parent = telemetry.unsampled(trace_parent)
        caller = callers.name_of(context)
        unit = Unit((), caller, "ImportUsers", caller, trace_parent, trace_state, independent=True)
        async for answer in self._imports.stream(request_iterator, unit):
            yield answer

    async def _change(
        self, mutation: Mutation, request: Any, method: str, context: _Context, violations: validation.Violations
    ) -> bytes:
        request_id = validation.request_id(request.request_id, "request_id", violations)
        if violations:
            raise invalid(*violations)
        item = Item(mutation, request_id, _body_hash(request) if request_id else b"")
        return (await self._submit((item,), method, context))[0]

    async def _submit(
        self, items: tuple[Item, ...], method: str, context: _Context, *, validate_only: bool = False
    ) -> list[bytes]:
        caller = callers.name_of(context)
        trace_parent, trace_state = tracing.incoming(context)
        return await self._writer.submit(
            Unit(
                items,
                caller=caller,
                method=method,
                actor=caller,
                trace_parent=trace_parent,
                trace_state=trace_state,
                validate_only=validate_only,
            )
        )

    # Reads

    async def GetUser(self, request: users_pb2.GetUserRequest, context: _Context) -> users_pb2.User:
        user_id = validation.user_id(request.id, "id")
        async with self._connection() as connection:
            found = await reads.users_by_id(connection, [user_id])
        if user_id not in found:
            raise errors.user_not_found(request.id, "id")
        return found[user_id]

    async def BatchGetUsers(
        self, request: users_pb2.BatchGetUsersRequest, context: _Context
    ) -> users_pb2.BatchGetUsersResponse:
        if not 1 <= len(request.ids) <= validation.MOST_IN_BATCH:
            raise invalid(Violation("ids", f"must be 1 to {validation.MOST_IN_BATCH}"))
        ids = [validation.user_id(text, f"ids[{index}]") for index, text in enumerate(request.ids)]
        async with self._connection() as connection:
            found = await reads.users_by_id(connection, ids)
        missing = [text for text, user_id in zip(request.ids, ids, strict=True) if user_id not in found]
        if missing:
            shown = ", ".join(missing[:10])
            raise NotFoundError(
                f"ids: no user {shown}", reason="USER_NOT_FOUND", metadata={"field": "ids", "ids": shown}
            )
        return users_pb2.BatchGetUsersResponse(users=[found[user_id] for user_id in ids])

    async def ListUsers(self, request: users_pb2.ListUsersRequest, context: _Context) -> users_pb2.ListUsersResponse:
        size = rpc.page_size(request.page_size)
        filters = request.filter
        selection = tokens.selection_hash(str(request.show_deleted), filters.username_prefix, filters.email_prefix)
        after = tokens.decode_page(request.page_token, selection) if request.page_token else _NIL
        async with self._connection() as connection:
            users = await reads.list_users(
                connection,
                after,
                size + 1,
                show_deleted=request.show_deleted,
                username_prefix=filters.username_prefix,
                email_prefix=filters.email_prefix,
            )
        token = tokens.encode_page(uuid.UUID(users[size - 1].id), selection) if len(users) > size else ""
        return users_pb2.ListUsersResponse(users=users[:size], next_page_token=token)

    async def GetFeed(self, request: users_pb2.GetFeedRequest, context: _Context) -> users_pb2.Feed:
        async with self._connection() as connection:
            state = await reads.feed_state(connection)
        return users_pb2.Feed(
            log_id=str(state.log_id),
            earliest_position=state.earliest,
            head_position=state.head,
            head_time=reads.stamp(state.head_time),
        )

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        try:
            async with self._pool.connection() as connection:
                yield connection
        except psycopg.OperationalError as error:
            raise errors.database_unavailable() from error

    # The feed

    async def WatchUsers(self, request: users_pb2.WatchUsersRequest, context: _Context) -> AsyncIterator[bytes]:  # type: ignore[override]
        async for message in self._streams.stream(watch_request.check(request), callers.name_of(context)):
            yield message


def _body_hash(request: Any) -> bytes:
    """What tells whether a request_id comes with the same request again."""
    request_id, request.request_id = request.request_id, ""
    try:
        return creation.body_hash(request.SerializeToString(deterministic=True))
    finally:
        request.request_id = request_id
