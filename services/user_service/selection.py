"""What a stream selects: users by id, labels and shard, and events by type and changed fields.

Pure and hashable: streams that select the same are equal, in whatever order they name it, and share messages. An event
is selected if its user matched before or after the change; if only before, it says so (`left_filter`), for the
subscriber must forget the user. Only labels need an event decoded; the rest stands beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tidings.users.v1 import users_pb2
from user_service import events, tokens
from user_service.events import Entry, shard_hash


@dataclass(frozen=True, slots=True)
class Selection:
    """Users that have one of the ids, all of the labels, and a hash of the shard; of these, events of one of the types
    that changed one of the fields (bits, as in `Entry`). What is empty selects everything.

    `digest` stands for all of it, and is empty if everything is selected. Tokens hold its beginning (`short`): what it
    is made of must not change.
    """

    user_ids: frozenset[bytes] = field(default=frozenset(), compare=False)
    labels: frozenset[tuple[str, str]] = field(default=frozenset(), compare=False)
    types: frozenset[int] = field(default=frozenset(), compare=False)
    changed_fields: int = field(default=0, compare=False)
    shard_index: int = field(default=0, compare=False)
    shard_count: int = field(default=1, compare=False)
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        parts = (
            sorted(user_id.hex() for user_id in self.user_ids),
            sorted(self.labels),
            sorted(self.types),
            self.changed_fields,
            (self.shard_index, self.shard_count),
        )
        selects = self.selects_events or self.user_ids or self.labels or self.shard_count > 1
        object.__setattr__(self, "digest", hashlib.sha256(json.dumps(parts).encode()).digest() if selects else b"")

    @property
    def short(self) -> bytes:
        """The 8 bytes that stand for it in a token."""
        return self.digest[:8] or tokens.EVERYTHING

    @property
    def selects_events(self) -> bool:
        """Whether it tells events of one user apart."""
        return bool(self.types or self.changed_fields)

    def has_user(self, user_id: bytes, labels: Mapping[str, str]) -> bool:
        """Whether a user with these labels is selected."""
        return (
            (not self.user_ids or user_id in self.user_ids)
            and (self.shard_count == 1 or shard_hash(user_id) % self.shard_count == self.shard_index)
            and self._has_labels(labels)
        )

    def select(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The events that are selected. The element of one whose user matches no longer has left_filter set."""
        if self.user_ids:
            entries = [entry for entry in entries if entry.user_id in self.user_ids]
        if self.shard_count > 1:
            count, index = self.shard_count, self.shard_index
            entries = [entry for entry in entries if shard_hash(entry.user_id) % count == index]
        if self.types:
            entries = [entry for entry in entries if entry.type in self.types]
        if self.changed_fields:
            entries = [entry for entry in entries if entry.changed_fields & self.changed_fields]
        if self.labels:
            entries = [entry for entry in map(self._by_labels, entries) if entry is not None]
        return entries

    def _by_labels(self, entry: Entry) -> Entry | None:
        [event] = users_pb2.WatchUsersResponse.FromString(entry.element).events
        if self._has_labels(event.user.labels):
            return entry
        if entry.previous is not None and self._has_labels(users_pb2.User.FromString(entry.previous).labels):
            return events.left_filter(entry)
        return None

    def _has_labels(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.labels)


EVERYTHING = Selection()
