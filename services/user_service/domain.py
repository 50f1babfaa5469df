"""What a change does to a user: pure decisions over what is known.

A `Unit` is what is asked for at once: one change, the changes of a BatchCreateUsers, of which all happen or none, or
some users of an import, each of which is refused on its own. `decide` and `decide_each` take a unit and the state read
under the feed's lock and say what happens. Two units that share a key (`Unit.keys`) are never decided on the same read,
so that a decision need not know of the other units of its batch. It knows of the items before it in its own unit; one
that was refused leaves nothing behind.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from google.protobuf import timestamp_pb2
from uuid_utils import UUID

from servicekit.errors import ServiceError
from tidings.users.v1 import users_pb2
from user_service import errors
from user_service.validation import CALLER_FIELDS
from user_service.wire import delimited, tag

CREATED = users_pb2.UserEvent.CREATED
UPDATED = users_pb2.UserEvent.UPDATED
DELETED = users_pb2.UserEvent.DELETED
UNDELETED = users_pb2.UserEvent.UNDELETED

FIELD_NUMBERS = {
    name: users_pb2.User.DESCRIPTOR.fields_by_name[name].number for name in users_pb2.User.DESCRIPTOR.fields_by_name
}
_ID = tag(FIELD_NUMBERS["id"], 2)
_TEXT_FIELDS = tuple([name for name in CALLER_FIELDS if name != "labels"])
# What a deletion and its undoing change.
DELETION_FIELDS = ("delete_time", "purge_time")


class Create(NamedTuple):
    """A new user; `user` holds its id and the caller's fields, `given` is the latter encoded, `encoded` is both."""

    user: users_pb2.User
    labels: Mapping[str, str]
    given: bytes
    encoded: bytes
    id: bytes
    email_key: str
    changed_fields: tuple[str, ...]
    path: str = "user"


def create(
    user: users_pb2.User, labels: Mapping[str, str], user_id: UUID, email_key: str, path: str = "user"
) -> Create:
    """A Create of a user of whom the caller's fields alone are set, with its labels; its id is set here."""
    given = user.SerializeToString(deterministic=True)
    changed = tuple([name for name in _TEXT_FIELDS if getattr(user, name)])
    if labels:
        changed += ("labels",)
    text = str(user_id)
    user.id = text
    return Create(user, labels, given, delimited(_ID, text.encode()) + given, user_id.bytes, email_key, changed, path)


class Update(NamedTuple):
    """New values of the named fields of a living user."""

    id: bytes
    user: users_pb2.User
    fields: tuple[str, ...]
    email_key: str
    version: int


class Delete(NamedTuple):
    """The soft deletion of a living user."""

    id: bytes
    version: int


class Undelete(NamedTuple):
    """Takes a soft deletion back."""

    id: bytes


Mutation = Create | Update | Delete | Undelete
# Ids are the 16 bytes of a UUID.
AnswerKey = tuple[bytes, str, str]  # request_id, caller, method


class Item(NamedTuple):
    """One change of a unit, with the request_id that makes its retry safe."""

    mutation: Mutation
    request_id: bytes | None
    body_hash: bytes
    request_id_path: str = "request_id"


class Unit(NamedTuple):
    """What is asked for at once. `independent`: its items are refused on their own, else all happen or none."""

    items: tuple[Item, ...]
    caller: str
    method: str
    actor: str = ""
    trace_parent: str = ""
    trace_state: str = ""
    validate_only: bool = False
    independent: bool = False

    @property
    def exclusive(self) -> bool:
        """Whether it must be alone in its batch: an undeletion takes names that only the read tells."""
        return any(isinstance(item.mutation, Undelete) for item in self.items)

    def keys(self) -> set[object]:
        """Everything that another unit of the same batch must not touch."""
        keys: set[object] = set()
        for item in self.items:
            mutation = item.mutation
            if item.request_id is not None:
                keys.add(item.request_id)
            if isinstance(mutation, Create):
                keys.add("u" + mutation.user.username)
                keys.add("e" + mutation.email_key)
            else:
                keys.add(mutation.id)
                if isinstance(mutation, Update):
                    if "username" in mutation.fields:
                        keys.add("u" + mutation.user.username)
                    if "email" in mutation.fields:
                        keys.add("e" + mutation.email_key)
        return keys


@dataclass(slots=True)
class Row:
    """A stored user, and whether a living user has its names (asked only for a soft-deleted one)."""

    user: users_pb2.User
    email_key: str
    purge_time: datetime | None = None
    username_taken: bool = False
    email_taken: bool = False


@dataclass(slots=True)
class Known:
    """What was read under the lock: all that the decisions of a batch need."""

    rows: dict[bytes, Row] = field(default_factory=dict)
    usernames: dict[str, bytes] = field(default_factory=dict)
    email_keys: dict[str, bytes] = field(default_factory=dict)
    answers: dict[AnswerKey, tuple[bytes, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Moment:
    """The commit time of a batch, as a datetime and as the message that all its events carry, plain and encoded.

    `created` is what a new user has besides the caller's fields, encoded: its version and times.
    """

    time: datetime
    stamp: timestamp_pb2.Timestamp
    encoded: bytes
    created: bytes
    deleted_kept: timedelta


def moment(time: datetime, deleted_kept: timedelta) -> Moment:
    """The moment of a commit."""
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(time)
    encoded = stamp.SerializeToString()
    created = users_pb2.User(version=1, create_time=stamp, update_time=stamp).SerializeToString()
    return Moment(time, stamp, encoded, created, deleted_kept)


class Change(NamedTuple):
    """One decided change: it will be an event. `encoded` is the user after it; of a new one `user` lacks version and
    times. `labels` are the user's, read from the message once.
    """

    type: users_pb2.UserEvent.Type.ValueType
    id: bytes
    user: users_pb2.User
    labels: Mapping[str, str]
    encoded: bytes
    previous: users_pb2.User | None
    email_key: str
    changed_fields: tuple[str, ...]


class Decision(NamedTuple):
    """What happens for one item: an earlier answer is repeated, a change is made, or nothing changes (`user` is the
    answer).
    """

    item: Item
    answer: bytes | None = None
    change: Change | None = None
    user: users_pb2.User | None = None


def decide(unit: Unit, known: Known, moment: Moment) -> list[Decision]:
    """Decides every item of a unit, or raises a ServiceError if one is refused."""
    return [_decide_item(unit, item, known, moment) for item in unit.items]


def decide_each(unit: Unit, known: Known, moment: Moment) -> list[Decision | ServiceError]:
    """Decides every item of an independent unit: a refusal stands in its decision's place."""
    return [_decide_alone(unit, item, known, moment) for item in unit.items]


def _decide_alone(unit: Unit, item: Item, known: Known, moment: Moment) -> Decision | ServiceError:
    try:
        decision = _decide_item(unit, item, known, moment)
    except ServiceError as error:
        return error
    if item.request_id is not None and decision.change is not None:
        # The same request_id again, further on in the unit, is a retry like any other.
        known.answers[(item.request_id, unit.caller, unit.method)] = (item.body_hash, decision.change.encoded)
    return decision


def _decide_item(unit: Unit, item: Item, known: Known, moment: Moment) -> Decision:
    if item.request_id is not None:
        earlier = known.answers.get((item.request_id, unit.caller, unit.method))
        if earlier is not None:
            body_hash, answer = earlier
            if body_hash != item.body_hash:
                raise errors.request_id_reused(item.request_id_path, _text(item.request_id))
            return Decision(item, answer=answer)
    mutation = item.mutation
    if isinstance(mutation, Create):
        return Decision(item, change=_create(mutation, known, moment))
    if isinstance(mutation, Update):
        change = _update(mutation, known, moment)
        return Decision(item, change=change) if change else Decision(item, user=known.rows[mutation.id].user)
    if isinstance(mutation, Delete):
        return Decision(item, change=_delete(mutation, known, moment))
    return Decision(item, change=_undelete(mutation, known, moment))


def _create(create: Create, known: Known, moment: Moment) -> Change:
    user = create.user
    if user.username in known.usernames:
        raise errors.name_taken("username", f"{create.path}.username", user.username)
    if create.email_key in known.email_keys:
        raise errors.name_taken("email", f"{create.path}.email", user.email)
    # Later items of the same unit see the names as taken. Units of one batch share no names, so that a unit that is
    # refused after this leaves nothing behind that another would see.
    known.usernames[user.username] = create.id
    known.email_keys[create.email_key] = create.id
    encoded = create.encoded + moment.created
    return Change(CREATED, create.id, user, create.labels, encoded, None, create.email_key, create.changed_fields)


def _living(user_id: bytes, version: int, known: Known, path: str) -> Row:
    row = known.rows.get(user_id)
    if row is None or row.user.HasField("delete_time"):
        raise errors.user_not_found(_text(user_id), path)
    if version and version != row.user.version:
        raise errors.stale_version(_text(user_id), version, row.user.version)
    return row


def _next(row: Row, moment: Moment) -> users_pb2.User:
    after = users_pb2.User()
    after.CopyFrom(row.user)
    after.version += 1
    after.update_time.CopyFrom(moment.stamp)
    return after


def _changed(
    kind: users_pb2.UserEvent.Type.ValueType,
    user_id: bytes,
    after: users_pb2.User,
    row: Row,
    email_key: str,
    fields: tuple[str, ...],
) -> Change:
    return Change(kind, user_id, after, dict(after.labels), after.SerializeToString(), row.user, email_key, fields)


def _update(update: Update, known: Known, moment: Moment) -> Change | None:
    row = _living(update.id, update.version, known, "user.id")
    before, given = row.user, update.user
    changed = tuple(name for name in update.fields if getattr(given, name) != getattr(before, name))
    if not changed:
        return None
    if "username" in changed and known.usernames.get(given.username, update.id) != update.id:
        raise errors.name_taken("username", "user.username", given.username)
    email_key = update.email_key if "email" in changed else row.email_key
    if "email" in changed and known.email_keys.get(email_key, update.id) != update.id:
        raise errors.name_taken("email", "user.email", given.email)
    after = _next(row, moment)
    for name in changed:
        if name == "labels":
            after.labels.clear()
            after.labels.update(given.labels)
        else:
            setattr(after, name, getattr(given, name))
    return _changed(UPDATED, update.id, after, row, email_key, changed)


def _delete(delete: Delete, known: Known, moment: Moment) -> Change:
    row = _living(delete.id, delete.version, known, "id")
    after = _next(row, moment)
    after.delete_time.CopyFrom(moment.stamp)
    after.purge_time.FromDatetime(moment.time + moment.deleted_kept)
    return _changed(DELETED, delete.id, after, row, row.email_key, DELETION_FIELDS)


def _undelete(undelete: Undelete, known: Known, moment: Moment) -> Change:
    row = known.rows.get(undelete.id)
    if row is None or (row.purge_time is not None and row.purge_time <= moment.time):
        raise errors.user_not_found(_text(undelete.id), "id")
    if not row.user.HasField("delete_time"):
        raise errors.not_deleted(_text(undelete.id))
    if row.username_taken:
        raise errors.name_taken("username", "user.username", row.user.username)
    if row.email_taken:
        raise errors.name_taken("email", "user.email", row.user.email)
    after = _next(row, moment)
    after.ClearField("delete_time")
    after.ClearField("purge_time")
    return _changed(UNDELETED, undelete.id, after, row, row.email_key, DELETION_FIELDS)


def _text(id_: bytes) -> str:
    return str(uuid.UUID(bytes=id_))


@lru_cache(maxsize=1024)
def field_bits(changed_fields: tuple[str, ...]) -> int:
    """The changed fields as bits: bit n stands for field number n of User."""
    bits = 0
    for name in changed_fields:
        bits |= 1 << FIELD_NUMBERS[name]
    return bits
