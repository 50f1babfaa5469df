"""What a filter or a shard selects, said a second time and independently of the service."""

from __future__ import annotations

import uuid
import zlib

from tests.proof.records import Event, Selection, State


def selects_user(selection: Selection, user: State) -> bool:
    """Whether a user as it is matches what selects users."""
    if "user_ids" in selection and user.id not in selection["user_ids"]:
        return False
    if "shard" in selection:
        index, count = selection["shard"]
        if zlib.crc32(uuid.UUID(user.id).bytes) % count != index:
            return False
    wanted: dict[str, str] = selection.get("labels", {})
    return all(user.labels.get(key) == value for key, value in wanted.items())


def selects_event(selection: Selection | None, event: Event, before: State | None) -> bool:
    """Whether an event is sent: its user matched before or after the change, and the event matches too."""
    if selection is None:
        return True
    if "types" in selection and event.type not in selection["types"]:
        return False
    if "changed_fields" in selection and not set(selection["changed_fields"]) & set(event.fields):
        return False
    return selects_user(selection, event.user) or (before is not None and selects_user(selection, before))


def leaves(selection: Selection | None, event: Event, before: State | None) -> bool:
    """Whether the user of a sent event is no longer selected."""
    if selection is None or before is None:
        return False
    return selects_user(selection, before) and not selects_user(selection, event.user)
