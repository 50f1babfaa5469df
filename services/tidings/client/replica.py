"""A copy of the users that a feed selects, kept in memory.

What always holds, whatever the connection goes through:
- A user in the copy is never older than the last batch applied, and within a history never becomes older. A snapshot is
  read page by page while changes go on, so a page may be ahead of the snapshot's position; the changes that it already
  holds come once more after it and are left out, for a change counts only if its version is above the copy's. Once the
  feed has caught up, the copy equals the table, users that are deleted or no longer match the filter left out.
- A user of a snapshot replaces what was there, for the copy may be of another history, whose versions do not compare.
  Users that a snapshot has not named when it ends are dropped; until then they stay.

A copy in a database follows the same rules: examples/keep_a_copy.py has the statements.
"""

from __future__ import annotations

from tidings.client.feed import Batch
from tidings.users.v1 import users_pb2


def leaves(event: users_pb2.UserEvent) -> bool:
    """Whether a change takes its user out of a copy: it was deleted, or no longer matches the filter of the feed."""
    return event.left_filter or event.type == users_pb2.UserEvent.DELETED


class Replica:
    """`users` by their ids. The feed that fills it has `start="snapshot"`, and its cursor, if any, lives as long."""

    def __init__(self) -> None:
        self.users: dict[str, users_pb2.User] = {}
        # False until a snapshot has been applied: users may be missing.
        self.is_whole = False
        # The users that the snapshot under way has named.
        self._named: set[str] | None = None

    def apply(self, batch: Batch) -> None:
        """Applies a batch, each once and in the order of the feed.

        Raises ValueError for the rest of a snapshot whose beginning was not applied: the cursor is older than the copy.
        """
        if batch.snapshot is None:
            for event in batch.events:
                self._change(event)
        elif batch.snapshot == "begin":
            self._named = set()
        elif self._named is None:
            raise ValueError("a snapshot goes on whose beginning was not applied here; begin without a cursor")
        elif batch.snapshot == "within":
            named = {event.user.id: event.user for event in batch.events}
            self.users |= named
            self._named |= named.keys()
        else:
            for user_id in self.users.keys() - self._named:
                del self.users[user_id]
            self._named, self.is_whole = None, True

    def _change(self, event: users_pb2.UserEvent) -> None:
        user = event.user
        known = self.users.get(user.id)
        if known is not None and known.version >= user.version:
            return
        if leaves(event):
            self.users.pop(user.id, None)
        else:
            # A copy, for a part of a message keeps the whole message in memory.
            self.users[user.id] = users_pb2.User()
            self.users[user.id].CopyFrom(user)
