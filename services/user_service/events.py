"""How an event is encoded: once, when it is written.

The stored bytes of an event are the finished element of WatchUsersResponse.events: tag, length, UserEvent. A message of
the stream is a join of such elements and a tail (token, positions, mark); protobuf takes fields in any order, so
joining is concatenation. `previous` is stored beside the element and spliced in only for streams that ask.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from google.protobuf import timestamp_pb2

from tidings.users.v1 import users_pb2
from user_service.domain import Change

_ELEMENT_TAG = b"\x0a"  # field 1, length-delimited
_PREVIOUS_TAG = b"\x2a"  # field 5, length-delimited: UserEvent.previous

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

    @property
    def size(self) -> int:
        """Bytes it costs in memory, roughly."""
        return len(self.element) + len(self.previous or b"") + 200


def shard_hash(user_id: uuid.UUID) -> int:
    """What shards are cut by: CRC-32 (IEEE 802.3, as in zlib) of the 16 bytes of the id."""
    return zlib.crc32(user_id.bytes)


def varint(number: int) -> bytes:
    """A base-128 varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def element(body: bytes) -> bytes:
    """An encoded message as an element of a repeated field 1."""
    return b"".join((_ELEMENT_TAG, varint(len(body)), body))


def encode(
    change: Change,
    position: int,
    event_id: uuid.UUID,
    commit_time: timestamp_pb2.Timestamp,
    actor: str,
    trace_parent: str,
    trace_state: str,
) -> bytes:
    """The finished element of an event."""
    event = users_pb2.UserEvent(
        position=position,
        id=str(event_id),
        type=change.type,
        user=change.user,
        changed_fields=change.changed_fields,
        commit_time=commit_time,
        actor=actor,
        trace_parent=trace_parent,
        trace_state=trace_state,
    )
    return element(event.SerializeToString())


def _with_previous(entry: Entry) -> bytes:
    if entry.previous is None:
        return entry.element
    start = 2  # past the tag and the first byte of the length
    while entry.element[start - 1] & 0x80:
        start += 1
    return element(b"".join((entry.element[start:], _PREVIOUS_TAG, varint(len(entry.previous)), entry.previous)))


def join(entries: Sequence[Entry], include_previous: bool) -> list[bytes]:
    """The elements of a message."""
    if include_previous:
        return [_with_previous(entry) for entry in entries]
    return [entry.element for entry in entries]


def cut(entries: Sequence[Entry], include_previous: bool) -> int:
    """How many of the entries fit into one message; at least one."""
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
        bookmark=bookmark,
        caught_up=caught_up,
        fell_behind=fell_behind,
        drain=drain,
    ).SerializeToString()
