"""A model of the user service: a table, its log, and WatchUsers over both, snapshots included.

Changes are made at random between any two messages, and connections break there, so that a client sees pages of a
snapshot that are ahead of its position, resumes in the middle of it, and finds its place expired.
"""

from __future__ import annotations

import random
import uuid
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from tests.client.conftest import Context, Response, abort
from tidings.users.v1 import users_pb2

Request = users_pb2.WatchUsersRequest

_TEAMS = ("engines", "looms", "tables")
_EVENT = users_pb2.UserEvent


@dataclass(frozen=True)
class Change:
    """An event and what its user was before."""

    event: users_pb2.UserEvent
    before: users_pb2.User | None


class Model:
    """`changes_left` are made while streams run; `breaks` is how likely a connection breaks after a message."""

    def __init__(self, seed: int, *, users: int = 20, changes_left: int = 60, breaks: float = 0.2) -> None:
        self._random = random.Random(seed)
        self.log = "log"
        self.table: dict[str, users_pb2.User] = {}
        self.changes: list[Change] = []
        self.earliest = 1
        self.changes_left = changes_left
        self.breaks = breaks
        # How likely a stream that resumes finds that its place is no longer retained.
        self.expires = 0.0
        self.starts: list[str] = []
        for _ in range(users):
            self._create()

    @property
    def head(self) -> int:
        """The newest position."""
        return len(self.changes)

    def living(self, request: users_pb2.WatchUsersRequest) -> dict[str, users_pb2.User]:
        """What a copy that is made with this request must hold."""
        return {key: user for key, user in self.table.items() if _selected(user, request)}

    # Changes

    def change(self) -> None:
        """Changes the table at random."""
        known = self._random.choice(list(self.table.values())) if self.table else None
        if known is None or self._random.random() < 0.2:
            self._create()
            return
        user = users_pb2.User()
        user.CopyFrom(known)
        user.version += 1
        if user.HasField("delete_time"):
            user.ClearField("delete_time")
            self._store(_EVENT.UNDELETED, user)
        elif self._random.random() < 0.3:
            user.delete_time.GetCurrentTime()
            self._store(_EVENT.DELETED, user)
        else:
            user.labels["team"] = self._random.choice(_TEAMS)
            self._store(_EVENT.UPDATED, user)

    def _create(self) -> None:
        user_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        team = self._random.choice(_TEAMS)
        self._store(
            _EVENT.CREATED, users_pb2.User(id=user_id, username=f"u-{user_id}", version=1, labels={"team": team})
        )

    def _store(self, kind: users_pb2.UserEvent.Type.ValueType, user: users_pb2.User) -> None:
        event = users_pb2.UserEvent(position=self.head + 1, type=kind, user=user, id=str(uuid.uuid4()))
        self.changes.append(Change(event, self.table.get(user.id)))
        self.table[user.id] = user

    def begin_another_history(self) -> None:
        """As a restore from a backup does: another log, whose versions do not follow those of the one before."""
        self.log = "another"
        for user in list(self.table.values())[::2]:
            del self.table[user.id]
        for user_id, user in self.table.items():
            older = users_pb2.User()
            older.CopyFrom(user)
            older.version, older.labels["team"] = 1, "restored"
            self.table[user_id] = older

    # The stream

    async def watch(self, request: users_pb2.WatchUsersRequest, context: Context) -> AsyncIterator[Response]:
        """A script for `ScriptedUsers`."""
        self.starts.append(request.WhichOneof("start") or "")
        async for message in self._messages(request, context):
            yield message
            for _ in range(min(self.changes_left, self._random.randrange(4))):
                self.changes_left -= 1
                self.change()
            if self._random.random() < self.breaks:
                await abort(context, grpc.StatusCode.UNAVAILABLE)

    async def _messages(self, request: users_pb2.WatchUsersRequest, context: Context) -> AsyncIterator[Response]:
        position, last = await self._start(request, context)
        mark = Response.Bookmark(head_position=self.head)
        yield self._message(position, position, token=self._token(position, last), bookmark=mark)
        if last is not None:
            async for message in self._snapshot(request, position, last):
                yield message
        while True:
            upto = min(position + self._random.randrange(1, 6), self.head)
            if upto > position:
                found = [event for one in self.changes[position:upto] if (event := _sent(one, request))]
                yield self._message(position, upto, found)
                position = upto
            elif self.changes_left:
                yield self._message(position, position, bookmark=Response.Bookmark(head_position=self.head))
            else:
                self.breaks = 0
                yield self._message(position, position, caught_up=Response.CaughtUp(position=position))

    async def _start(self, request: users_pb2.WatchUsersRequest, context: Context) -> tuple[int, str | None]:
        """The position, and the last user of a snapshot that goes on."""
        match request.WhichOneof("start"):
            case "snapshot":
                return self.head, ""
            case "earliest":
                return self.earliest - 1, None
        log, position, *last = request.resume_token.split("/")
        if log != self.log:
            await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "FOREIGN_TOKEN")
        if int(position) < self.earliest - 1 or self._random.random() < self.expires:
            metadata = {"earliest_position": str(self.earliest)}
            await abort(context, grpc.StatusCode.OUT_OF_RANGE, "POSITION_EXPIRED", metadata)
        return int(position), last[0] if last else None

    async def _snapshot(
        self, request: users_pb2.WatchUsersRequest, position: int, last: str
    ) -> AsyncIterator[Response]:
        if not last:
            mark = Response.SnapshotBegin(position=position)
            yield self._message(position, position, token=self._token(position, ""), snapshot_begin=mark)
        # Page by page, each as the table is then.
        while page := sorted(user_id for user_id in self.living(request) if user_id > last)[:3]:
            found = [
                users_pb2.UserEvent(position=position, type=_EVENT.SNAPSHOT, user=self.table[user_id])
                for user_id in page
            ]
            last = page[-1]
            yield self._message(position, position, found, token=self._token(position, last))
        yield self._message(position, position, snapshot_end=Response.SnapshotEnd(position=position))

    def _token(self, position: int, last: str | None = None) -> str:
        return f"{self.log}/{position}" + ("" if last is None else f"/{last}")

    def _message(
        self, after: int, upto: int, events: list[users_pb2.UserEvent] | None = None, token: str = "", **mark: object
    ) -> Response:
        return Response(
            events=events or [],
            resume_token=token or self._token(upto),
            previous_position=after,
            position=upto,
            **mark,
        )


def _matches(user: users_pb2.User | None, request: users_pb2.WatchUsersRequest) -> bool:
    if user is None or any(user.labels.get(key) != value for key, value in request.filter.labels.items()):
        return False
    shard = request.shard
    return not shard.count or zlib.crc32(uuid.UUID(user.id).bytes) % shard.count == shard.index


def _selected(user: users_pb2.User, request: users_pb2.WatchUsersRequest) -> bool:
    return not user.HasField("delete_time") and _matches(user, request)


def _sent(change: Change, request: users_pb2.WatchUsersRequest) -> users_pb2.UserEvent | None:
    before, after = _matches(change.before, request), _matches(change.event.user, request)
    if not before and not after:
        return None
    event = users_pb2.UserEvent()
    event.CopyFrom(change.event)
    event.left_filter = not after
    return event
