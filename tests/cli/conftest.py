"""A directory of users in memory behind a real gRPC server, and `tidings` as a process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_status import rpc_status

from tests.harness import ServiceProcess, programs
from tidings.notifications.v1 import in_app_pb2, in_app_pb2_grpc, notifications_pb2, notifications_pb2_grpc
from tidings.users.v1 import users_pb2, users_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
NAMES = (
    "liveness", "startup", "balancing", "readiness",
    "tidings.users.v1.UserService", "tidings.notifications.v1.NotificationService",
)  # fmt: skip
NOW = timestamp_pb2.Timestamp(seconds=1_700_000_000)


async def refuse(context: Context, code: grpc.StatusCode, reason: str, field: str, what: str) -> None:
    """Ends a call as the services do."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="tidings", metadata={"field": field})
    details: list[Any] = [info]
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=what)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    boxes = []
    for detail in details:
        boxes.append(any_pb2.Any())
        boxes[-1].Pack(detail)
    status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=f"{field}: {what}", details=boxes))
    await context.abort(status.code, status.details, status.trailing_metadata)


class Directory(users_pb2_grpc.UserServiceServicer):
    """Users in memory, with request ids, a feed, and outages on demand."""

    def __init__(self) -> None:
        self.users: dict[str, users_pb2.User] = {}
        self.events: list[users_pb2.UserEvent] = []
        self.watched: list[users_pb2.WatchUsersRequest] = []
        self.answers: dict[str, users_pb2.User] = {}
        # Imports that were begun.
        self.imports = 0
        # Seconds that each user of an import takes.
        self.delay = 0.0
        # How many creations succeed before all are answered with UNAVAILABLE.
        self.unavailable_after: int | None = None
        # Whether all events are one atomic group.
        self.grouped = False
        self._changed = asyncio.Condition()

    async def CreateUser(self, request: users_pb2.CreateUserRequest, context: Context) -> users_pb2.User:
        """With a few of the rules."""
        if request.request_id in self.answers:
            return self.answers[request.request_id]
        if (refused := self._refusal(request.user)) is not None:
            await refuse(context, *refused)
        return await self._create(request.user, request.request_id)

    async def ImportUsers(
        self, requests: AsyncIterator[users_pb2.ImportUsersRequest], context: Context
    ) -> AsyncIterator[users_pb2.ImportUsersResponse]:
        """With the same rules."""
        self.imports += 1
        answer = users_pb2.ImportUsersResponse()
        async for request in requests:
            del answer.failed[:]
            for item in request.users:
                await asyncio.sleep(self.delay)
                if self.unavailable_after is not None and len(self.answers) >= self.unavailable_after:
                    yield answer
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "out of service")
                refused = None
                if item.request_id not in self.answers:
                    refused = self._refusal(item.user)
                if refused is not None:
                    code, reason, field, what = refused
                    violations = [users_pb2.ImportUsersResponse.Failure.Violation(field=field, description=what)]
                    answer.failed.add(
                        index=answer.processed, code=code.value[0], reason=reason, violations=violations,
                        message=f"{field}: {what}",
                    )  # fmt: skip
                else:
                    if item.request_id not in self.answers:
                        await self._create(item.user, item.request_id)
                    answer.created += 1
                answer.processed += 1
            yield answer

    def _refusal(self, user: users_pb2.User) -> tuple[grpc.StatusCode, str, str, str] | None:
        if "@" not in user.email:
            return grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "user.email", "must have an @"
        if any(other.username == user.username for other in self.users.values()):
            return grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN", "user.username", f"{user.username} is taken"
        if any(other.email.lower() == user.email.lower() for other in self.users.values()):
            return grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN", "user.email", f"{user.email} is taken"
        return None

    async def _create(self, given: users_pb2.User, request_id: str) -> users_pb2.User:
        user = users_pb2.User()
        user.CopyFrom(given)
        user.id, user.version = str(uuid.uuid4()), 1
        user.create_time.CopyFrom(NOW)
        self.answers[request_id] = user
        await self.store(user, users_pb2.UserEvent.CREATED)
        return user

    async def store(self, user: users_pb2.User, kind: users_pb2.UserEvent.Type.ValueType) -> None:
        """Stores a user and tells the watchers."""
        self.users[user.id] = user
        event = users_pb2.UserEvent(position=len(self.events) + 1, type=kind, user=user, commit_time=NOW)
        self.events.append(event)
        async with self._changed:
            self._changed.notify_all()

    async def GetUser(self, request: users_pb2.GetUserRequest, context: Context) -> users_pb2.User:
        """By id."""
        return await self._found(request.id, context)

    async def _found(self, user_id: str, context: Context) -> users_pb2.User:
        if user_id not in self.users:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "id", f"no user {user_id}")
        return self.users[user_id]

    async def ListUsers(self, request: users_pb2.ListUsersRequest, context: Context) -> users_pb2.ListUsersResponse:
        """Pages of what begins with the prefix."""
        found = [user for user in self.users.values() if user.username.startswith(request.filter.username_prefix)]
        first = int(request.page_token or 0)
        after = first + request.page_size
        return users_pb2.ListUsersResponse(
            users=found[first:after], next_page_token=str(after) if after < len(found) else ""
        )

    async def UpdateUser(self, request: users_pb2.UpdateUserRequest, context: Context) -> users_pb2.User:
        """With the version check."""
        user = users_pb2.User()
        user.CopyFrom(await self._found(request.user.id, context))
        if request.user.version and request.user.version != user.version:
            await refuse(context, grpc.StatusCode.ABORTED, "STALE_VERSION", "version", "is stale")
        for path in request.update_mask.paths:
            user.ClearField(path)
        given = users_pb2.User()
        request.update_mask.MergeMessage(request.user, given)
        user.MergeFrom(given)
        user.version += 1
        await self.store(user, users_pb2.UserEvent.UPDATED)
        return user

    async def GetFeed(self, request: users_pb2.GetFeedRequest, context: Context) -> users_pb2.Feed:
        """The head."""
        return users_pb2.Feed(log_id="log", earliest_position=1, head_position=len(self.events), head_time=NOW)

    async def WatchUsers(
        self, request: users_pb2.WatchUsersRequest, context: Context
    ) -> AsyncIterator[users_pb2.WatchUsersResponse]:
        """All events in messages of max_batch, without an end."""
        self.watched.append(request)
        match request.WhichOneof("start"):
            case "resume_token":
                if not request.resume_token.startswith("token-"):
                    await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "BAD_TOKEN", "resume_token", "is none")
                position = int(request.resume_token.removeprefix("token-"))
            case "now":
                position = len(self.events)
            case _:
                position = 0
        mark = users_pb2.WatchUsersResponse.Bookmark(head_position=len(self.events))
        yield self._message(position, [], bookmark=mark)
        while True:
            async with self._changed:
                while len(self.events) <= position:
                    await self._changed.wait()
            events = self.events[position : None if self.grouped else position + request.max_batch]
            yield self._message(position, events)
            position += len(events)

    def _message(self, position: int, events: list[users_pb2.UserEvent], **mark: Any) -> users_pb2.WatchUsersResponse:
        end = position + len(events)
        return users_pb2.WatchUsersResponse(
            events=events, resume_token=f"token-{end}", previous_position=position, position=end, **mark
        )


class Inbox(notifications_pb2_grpc.NotificationServiceServicer):
    """Answers what a test has put in."""

    def __init__(self) -> None:
        self.inbox = notifications_pb2.Inbox(log_id="log")
        self.notifications: list[notifications_pb2.Notification] = []
        self.deliveries: list[notifications_pb2.Delivery] = []
        self.steps: list[notifications_pb2.ExplainDeliveryResponse.Step] = []
        # What was asked for to be replayed or discarded.
        self.changes: list[notifications_pb2.ReplayDeliveriesRequest | notifications_pb2.DiscardDeliveriesRequest] = []

    async def GetInbox(self, request: notifications_pb2.GetInboxRequest, context: Context) -> notifications_pb2.Inbox:
        """The inbox."""
        return self.inbox

    async def ListNotifications(
        self, request: notifications_pb2.ListNotificationsRequest, context: Context
    ) -> notifications_pb2.ListNotificationsResponse:
        """One page."""
        return notifications_pb2.ListNotificationsResponse(notifications=self.notifications)

    async def ListDeliveries(
        self, request: notifications_pb2.ListDeliveriesRequest, context: Context
    ) -> notifications_pb2.ListDeliveriesResponse:
        """One page of those in the state."""
        state = request.filter.state
        return notifications_pb2.ListDeliveriesResponse(
            deliveries=[one for one in self.deliveries if not state or one.state == state]
        )

    async def ExplainDelivery(
        self, request: notifications_pb2.ExplainDeliveryRequest, context: Context
    ) -> notifications_pb2.ExplainDeliveryResponse:
        """What is told of the one that is known."""
        if request.notification_id != "known" and (request.event_id, request.user_id) != ("known", "ada"):
            await refuse(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_NOTIFICATION", "notification_id", "no such")
        return notifications_pb2.ExplainDeliveryResponse(steps=self.steps)

    async def ReplayDeliveries(
        self, request: notifications_pb2.ReplayDeliveriesRequest, context: Context
    ) -> notifications_pb2.ReplayDeliveriesResponse:
        """Of those that are there."""
        return notifications_pb2.ReplayDeliveriesResponse(replayed=await self._changed(request, context))

    async def DiscardDeliveries(
        self, request: notifications_pb2.DiscardDeliveriesRequest, context: Context
    ) -> notifications_pb2.DiscardDeliveriesResponse:
        """Of those that are there."""
        return notifications_pb2.DiscardDeliveriesResponse(discarded=await self._changed(request, context))

    async def _changed(
        self,
        request: notifications_pb2.ReplayDeliveriesRequest | notifications_pb2.DiscardDeliveriesRequest,
        context: Context,
    ) -> int:
        self.changes.append(request)
        known = {one.id: one.state for one in self.deliveries}
        for one in request.ids:
            if one not in known:
                await refuse(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_DELIVERY", "ids", f"no such delivery: {one}")
            if known[one] != notifications_pb2.Delivery.PARKED:
                await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "NOT_PARKED", "ids", f"not parked: {one}")
        return len(request.ids) or len(known)

    async def WatchNotifications(
        self, request: notifications_pb2.WatchNotificationsRequest, context: Context
    ) -> AsyncIterator[notifications_pb2.WatchNotificationsResponse]:
        """Everything, then silence."""
        bookmark = notifications_pb2.WatchNotificationsResponse.Bookmark()
        yield notifications_pb2.WatchNotificationsResponse(resume_token="token-0", bookmark=bookmark)
        yield notifications_pb2.WatchNotificationsResponse(
            notifications=self.notifications,
            resume_token="token",
            position=self.notifications[-1].position,
            in_app_counts=notifications_pb2.InAppCounts(total=1, unseen=1, unread=1) if request.user_id else None,
        )
        await asyncio.Event().wait()


class InApp(in_app_pb2_grpc.InAppServiceServicer):
    """Answers what a test has put in, and keeps what it was asked."""

    def __init__(self) -> None:
        self.notifications: list[notifications_pb2.Notification] = []
        self.counts = notifications_pb2.InAppCounts(total=3, unseen=1, unread=2, position=9)
        self.asked: list[in_app_pb2.ListInAppNotificationsRequest | in_app_pb2.UpdateInAppNotificationsRequest] = []

    async def ListInAppNotifications(
        self, request: in_app_pb2.ListInAppNotificationsRequest, context: Context
    ) -> in_app_pb2.ListInAppNotificationsResponse:
        """One page."""
        self.asked.append(request)
        return in_app_pb2.ListInAppNotificationsResponse(notifications=self.notifications)

    async def GetInAppCounts(
        self, request: in_app_pb2.GetInAppCountsRequest, context: Context
    ) -> notifications_pb2.InAppCounts:
        """The counts."""
        return self.counts

    async def UpdateInAppNotifications(
        self, request: in_app_pb2.UpdateInAppNotificationsRequest, context: Context
    ) -> in_app_pb2.UpdateInAppNotificationsResponse:
        """Of those that are there."""
        self.asked.append(request)
        known = {one.id for one in self.notifications}
        for one in request.ids:
            if one not in known:
                await refuse(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_NOTIFICATION", "ids", f"no such: {one}")
        return in_app_pb2.UpdateInAppNotificationsResponse(changed=len(request.ids) or 7, counts=self.counts)


class Health(HealthServicer):
    """With facts in its metadata, as the services have them."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, str] = {}

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Any:
        """With the facts."""
        context.set_trailing_metadata(tuple(self.facts.items()))
        return await super().Check(request, context)


@dataclass
class System:
    """Both services at one address, and their health."""

    directory: Directory
    inbox: Inbox
    health: Health
    address: str
    server: grpc.aio.Server
    in_app: InApp

    async def set_health(self, *off: str, **facts: str) -> None:
        """Which names are not SERVING, and what is said besides."""
        self.health.facts = {f"tidings-{name.replace('_', '-')}": text for name, text in facts.items()}
        for name in NAMES:
            status = health_pb2.HealthCheckResponse
            await self.health.set(name, status.NOT_SERVING if name in off else status.SERVING)


@dataclass(frozen=True)
class Ran:
    """What a command has said."""

    code: int
    out: str
    err: str


Tidings = Callable[..., Awaitable[Ran]]


async def _start(
    address: str, directory: Directory, inbox: Inbox, health: Health, in_app: InApp
) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    users_pb2_grpc.add_UserServiceServicer_to_server(directory, server)
    notifications_pb2_grpc.add_NotificationServiceServicer_to_server(inbox, server)
    in_app_pb2_grpc.add_InAppServiceServicer_to_server(in_app, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
async def system() -> AsyncIterator[System]:
    """Both services, ready."""
    directory, inbox, health = Directory(), Inbox(), Health()  # type: ignore[abstract]
    in_app = InApp()
    server, address = await _start("127.0.0.1:0", directory, inbox, health, in_app)
    made = System(directory, inbox, health, address, server, in_app)
    await made.set_health()
    yield made
    await server.stop(None)


def addresses(address: str, directory: Path) -> dict[str, str]:
    """What the command line needs to know."""
    return {
        "TIDINGS_CLIENT_USERS_ADDRESS": address,
        "TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS": address,
        "TIDINGS_CLIENT_MAIL_DIR": str(directory / "mail"),
    }


async def launch(
    system: System | ServiceProcess, directory: Path, *arguments: str
) -> programs.Process | asyncio.subprocess.Process:
    """`tidings` as a process of its own."""
    environment = os.environ | addresses(system.address, directory)
    return await programs.start("tidings.cli", *arguments, environment=environment, directory=directory, apart=True)


@pytest.fixture(scope="session")
async def worker() -> AsyncIterator[asyncio.subprocess.Process]:
    """The process that runs commands."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.cli.worker",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
    )  # fmt: skip
    yield process
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


@pytest.fixture
def tidings(worker: asyncio.subprocess.Process, system: System, tmp_path: Path) -> Tidings:
    """Runs `tidings` with arguments, in an empty directory."""

    async def run(*arguments: str, stdin: bytes = b"") -> Ran:
        assert worker.stdin is not None
        assert worker.stdout is not None
        request = {
            "arguments": arguments,
            "directory": str(tmp_path),
            "environment": addresses(system.address, tmp_path),
            "stdin": stdin.decode("latin-1"),
        }
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        return Ran(**json.loads(await worker.stdout.readline()))

    return run
