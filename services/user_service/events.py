"""How an event is encoded: once, when it is written.

The stored bytes of an event are the finished element of WatchUsersResponse.events: tag, length, UserEvent. A message of
the stream is a join of such elements and a tail (token, positions, mark); protobuf takes fields in any order, so
joining is concatenation. `previous` is stored beside the element and spliced in only for streams that ask, and so is
what only one selection is told (`left_filter`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from tidings.users.v1 import users_pb2
from user_service.domain import Change
from user_service.wire import delimited, tag, varint

_ELEMENT = tag(1, 2)
# Fields of UserEvent.
_POSITION, _TYPE, _USER, _PREVIOUS = tag(1, 0), tag(3, 0), tag(4, 2), tag(5, 2)
_EVENT_ID = tag(2, 2) + varint(36)  # the text of a UUID
_COMMIT_TIME, _ACTOR, _TRACE_PARENT, _TRACE_STATE = tag(7, 2), tag(8, 2), tag(10, 2), tag(11, 2)
_LEFT_FILTER = tag(9, 0) + varint(1)

# gRPC's usual limit is 4 MiB; a message of the feed stays under 1 MiB, its tail included.
LARGEST_MESSAGE = (1 << 20) - 4096


class Entry(NamedTuple):
    """An event as the feed handles it."""

    position: int
    event_id: bytes
    group_end: bool
    commit_time: datetime
    element: bytes
    previous: bytes | None
    # What filters and shards look at, so that they need not decode. `changed_fields` has bit n set for field n of User.
    user_id: bytes
    type: int
    changed_fields: int

    @property
    def size(self) -> int:
        """Bytes it costs in memory, roughly."""
        return len(self.element) + len(self.previous or b"") + 200


def shard_hash(user_id: bytes) -> int:
    """What shards are cut by: CRC-32 (IEEE 802.3, as in zlib) of the 16 bytes of the id."""
    return zlib.crc32(user_id)


def element(body: bytes) -> bytes:
    """An encoded message as an element of a repeated field 1."""
    return delimited(_ELEMENT, body)


@lru_cache(maxsize=1024)
def _changed_fields(names: tuple[str, ...]) -> bytes:
    return users_pb2.UserEvent(changed_fields=names).SerializeToString()


@lru_cache(maxsize=1024)
def _kind(kind: users_pb2.UserEvent.Type.ValueType) -> bytes:
    return _TYPE + varint(kind)


def origin(actor: str, trace_parent: str, trace_state: str) -> bytes:
    """The encoded fields that say where an event came from."""
    if not (actor or trace_parent):
        return b""
    given = ((_ACTOR, actor), (_TRACE_PARENT, trace_parent), (_TRACE_STATE, trace_state))
    return b"".join([delimited(key, text.encode()) for key, text in given if text])


def encode(change: Change, position: int, event_id: str, commit_time: bytes, came_from: bytes) -> bytes:
    """The finished element of an event; `commit_time` is an encoded Timestamp, `came_from` is of `origin`."""
    user = change.encoded
    body = (
        _POSITION
        + varint(position)
        + _EVENT_ID
        + event_id.encode()
        + _kind(change.type)
        + _USER
        + varint(len(user))
        + user
        + _changed_fields(change.changed_fields)
        + delimited(_COMMIT_TIME, commit_time)
        + came_from
    )
    return _ELEMENT + varint(len(body)) + body


def of_snapshot(user: users_pb2.User, user_id: bytes, position: int) -> Entry:
    """The SNAPSHOT event of a user: no change, hence without an id of its own; its time is that of the last change."""
    kind = users_pb2.UserEvent.SNAPSHOT
    event = users_pb2.UserEvent(position=position, type=kind, user=user, commit_time=user.update_time)
    time = user.update_time.ToDatetime(UTC)
    return Entry(position, b"", True, time, element(event.SerializeToString()), None, user_id, kind, 0)


def _append(stored: bytes, fields: bytes) -> bytes:
    """An element whose event has more encoded fields."""
    start = 2  # past the tag and the first byte of the length
    while stored[start - 1] & 0x80:
        start += 1
    return element(stored[start:] + fields)


def left_filter(entry: Entry) -> Entry:
    """An event that says that its user is no longer selected."""
    return entry._replace(element=_append(entry.element, _LEFT_FILTER))


def _with_previous(entry: Entry) -> bytes:
    if entry.previous is None:
        return entry.element
    return _append(entry.element, delimited(_PREVIOUS, entry.previous))


def join(entries: Sequence[Entry], include_previous: bool) -> list[bytes]:
    """The elements of a message."""
    if include_previous:
        return [_with_previous(entry) for entry in entries]
    return [entry.element for entry in entries]


def cut(entries: Sequence[Entry], include_previous: bool) -> int:
    """How many of the entries fit into one message; at least one, if there is one."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry.element) + (len(entry.previous or b"") + 16 if include_previous else 0)
        if size > LARGEST_MESSAGE:
            return max(count, 1)
    return len(entries)


def tail(
    token: str,
    previous_position: int,
    position: int,
    *,
    snapshot_begin: users_pb2.WatchUsersResponse.SnapshotBegin | None = None,
    snapshot_end: users_pb2.WatchUsersResponse.SnapshotEnd | None = None,
    bookmark: users_pb2.WatchUsersResponse.Bookmark | None = None,
    caught_up: users_pb2.WatchUsersResponse.CaughtUp | None = None,
    fell_behind: users_pb2.WatchUsersResponse.FellBehind | None = None,
    drain: users_pb2.WatchUsersResponse.Drain | None = None,
) -> bytes:
    """A message of the stream without its events."""
    return users_pb2.WatchUsersResponse(
        resume_token=token,
        previous_position=previous_position,
        position=position,
        snapshot_begin=snapshot_begin,
        snapshot_end=snapshot_end,
        bookmark=bookmark,
        caught_up=caught_up,
        fell_behind=fell_behind,
        drain=drain,
    ).SerializeToString()
