"""What is joined by hand is what the generated code would write."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from uuid_utils import UUID

from tidings.users.v1 import users_pb2
from user_service import domain, events, wire
from user_service.domain import Change
from user_service.events import Entry

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
_TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
_USERS = st.builds(
    users_pb2.User,
    id=_TEXTS,
    username=_TEXTS,
    email=_TEXTS,
    display_name=_TEXTS,
    locale=_TEXTS,
    time_zone=_TEXTS,
    labels=st.dictionaries(_TEXTS, _TEXTS, max_size=5),
)
_POSITIONS = st.integers(1, 2**63 - 1)
_ID = "01a2073c-72ab-73cb-bb17-373d23ea8734"


@given(st.integers(0, 2**64 - 1), _TEXTS)
@example(0x7F, "")
@example(0x80, "")
@example(0x3FFF, "")
@example(0x4000, "")
@example(0x1FFFFF, "")
@example(0x200000, "")
def test_the_wire_format(number: int, text: str) -> None:
    head = wire.tag(4, 0) + wire.varint(number) + wire.delimited(wire.tag(2, 2), text.encode())
    message = users_pb2.WatchUsersResponse.FromString(head)
    assert (message.position, message.resume_token) == (number, text)


@given(_USERS, _TIMES, _POSITIONS, _TEXTS, _TEXTS, _TEXTS)
def test_an_event_of_a_new_user(
    user: users_pb2.User, time: datetime, position: int, actor: str, parent: str, state: str
) -> None:
    moment = domain.moment(time, timedelta(days=30))
    after = users_pb2.User()
    after.CopyFrom(user)
    user.ClearField("id")
    created = domain.create(user, dict(user.labels), UUID(_ID), "key")
    known = domain.Known()
    unit = domain.Unit((domain.Item(created, None, b""),), caller="", method="CreateUser")
    [decision] = domain.decide(unit, known, moment)
    assert isinstance(decision, domain.Decision)
    assert decision.change is not None
    element = events.encode(decision.change, position, _ID, moment.encoded, events.origin(actor, parent, state))
    [event] = users_pb2.WatchUsersResponse.FromString(element).events
    after.id, after.version = _ID, 1
    after.create_time.CopyFrom(moment.stamp)
    after.update_time.CopyFrom(moment.stamp)
    assert event == users_pb2.UserEvent(
        position=position,
        id=_ID,
        type=users_pb2.UserEvent.CREATED,
        user=after,
        changed_fields=[name for name in ("username", "email", "display_name", "locale", "time_zone", "labels")
                        if getattr(user, name)],
        commit_time=moment.stamp,
        actor=actor,
        trace_parent=parent,
        trace_state=state if actor or parent else "",
    )  # fmt: skip


@given(_USERS, _USERS, _TIMES)
def test_the_user_before_a_change_is_spliced_in(before: users_pb2.User, after: users_pb2.User, time: datetime) -> None:
    moment = domain.moment(time, timedelta(days=30))
    change = Change(domain.UPDATED, b"", after, {}, after.SerializeToString(), before, "", ("email",))
    element = events.encode(change, 7, _ID, moment.encoded, b"")
    entry = Entry(7, b"", True, time, element, before.SerializeToString(), b"", 0, 0)
    for include in (False, True):
        [event] = users_pb2.WatchUsersResponse.FromString(b"".join(events.join([entry], include))).events
        assert event.user == after
        assert event.HasField("previous") == include
        assert not include or event.previous == before


def test_the_shard_hash_has_vectors() -> None:
    """Those that clients in other languages are held to as well."""
    file = Path(__file__).parents[1] / "vectors" / "shard_hash.json"
    for vector in json.loads(file.read_text())["vectors"]:
        crc32 = events.shard_hash(uuid.UUID(vector["id"]).bytes)
        index = {count: crc32 % int(count) for count in vector["index"]}
        assert {"id": vector["id"], "crc32": crc32, "index": index} == vector
