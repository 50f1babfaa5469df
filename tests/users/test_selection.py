"""What a selection selects, against a model that knows nothing of how events are stored."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from tidings.users.v1 import users_pb2
from user_service import domain, events, tokens, validation
from user_service.events import Entry
from user_service.selection import EVERYTHING, Selection

_TIME = datetime(2030, 1, 1, tzinfo=UTC)
_IDS = [bytes([number]) * 16 for number in range(6)]
_FIELDS = ("username", "email", "labels", "delete_time")
_TYPES = (domain.CREATED, domain.UPDATED, domain.DELETED, domain.UNDELETED)
_NAMES, _VALUES = ("a", "b", "c"), ("", "x", "y")

_labels = st.dictionaries(st.sampled_from(_NAMES), st.sampled_from(_VALUES), max_size=3)
_events = st.builds(
    lambda user_id, kind, fields, after, before: (
        user_id,
        users_pb2.UserEvent(
            type=kind,
            user=users_pb2.User(username="u" * 40, labels=after),
            previous=None if kind == domain.CREATED else users_pb2.User(labels=before),
            changed_fields=sorted(fields),
        ),
    ),
    st.sampled_from(_IDS),
    st.sampled_from(_TYPES),
    st.sets(st.sampled_from(_FIELDS)),
    _labels,
    _labels,
)


def _selections() -> st.SearchStrategy[Selection]:
    @st.composite
    def build(draw: st.DrawFn) -> Selection:
        count = draw(st.integers(1, 4))
        return Selection(
            user_ids=draw(st.frozensets(st.sampled_from(_IDS), max_size=3)),
            labels=frozenset(draw(st.one_of(st.just({}), _labels)).items()),
            types=draw(st.frozensets(st.sampled_from(_TYPES), max_size=3)),
            changed_fields=domain.field_bits(tuple(sorted(draw(st.sets(st.sampled_from(_FIELDS), max_size=2))))),
            shard_index=draw(st.integers(0, count - 1)),
            shard_count=count,
        )

    return build()


def _entry(position: int, user_id: bytes, event: users_pb2.UserEvent) -> Entry:
    stored = users_pb2.UserEvent()
    stored.CopyFrom(event)
    stored.ClearField("previous")
    previous = event.previous.SerializeToString() if event.HasField("previous") else None
    fields = domain.field_bits(tuple(event.changed_fields))
    element = events.element(stored.SerializeToString())
    return Entry(position, b"", True, _TIME, element, previous, user_id, event.type, fields)


def _model(selection: Selection, user_id: bytes, event: users_pb2.UserEvent) -> tuple[bool, bool]:
    """Whether an event is sent, and whether its user has left."""

    def matches(user: users_pb2.User) -> bool:
        return (
            (not selection.user_ids or user_id in selection.user_ids)
            and zlib.crc32(user_id) % selection.shard_count == selection.shard_index
            and all(key in user.labels and user.labels[key] == value for key, value in selection.labels)
        )

    after, before = matches(event.user), event.HasField("previous") and matches(event.previous)
    wanted = {name for name in _FIELDS if selection.changed_fields >> domain.FIELD_NUMBERS[name] & 1}
    chosen = (not selection.types or event.type in selection.types) and (
        not wanted or bool(wanted & set(event.changed_fields))
    )
    return chosen and (after or before), not after


@given(_selections(), st.lists(_events, max_size=20), st.booleans())
def test_selected_is_what_a_plain_reading_of_the_protocol_selects(
    selection: Selection, made: list[tuple[bytes, users_pb2.UserEvent]], include_previous: bool
) -> None:
    entries = [_entry(position, *one) for position, one in enumerate(made, 1)]
    expected = []
    for user_id, event in made:
        is_sent, left = _model(selection, user_id, event)
        if is_sent:
            sent = users_pb2.UserEvent()
            sent.CopyFrom(event)
            sent.left_filter = left
            if not include_previous:
                sent.ClearField("previous")
            expected.append(sent)
    joined = b"".join(events.join(selection.select(entries), include_previous))
    assert list(users_pb2.WatchUsersResponse.FromString(joined).events) == expected


@given(_selections(), _selections())
def test_equal_selections_are_those_that_name_the_same(one: Selection, other: Selection) -> None:
    def named(selection: Selection) -> tuple[object, ...]:
        shard = (selection.shard_index, selection.shard_count)
        return selection.user_ids, selection.labels, selection.types, selection.changed_fields, shard

    assert (one == other) == (named(one) == named(other))
    assert (one.short == other.short) == (one == other)
    assert (one == EVERYTHING) == (one.short == tokens.EVERYTHING)
    again = Selection(
        user_ids=frozenset(sorted(one.user_ids, reverse=True)),
        labels=frozenset(sorted(one.labels, reverse=True)),
        types=frozenset(sorted(one.types, reverse=True)),
        changed_fields=one.changed_fields,
        shard_index=one.shard_index,
        shard_count=one.shard_count,
    )
    assert (again, hash(again)) == (one, hash(one))


def test_tokens_outlive_releases() -> None:
    """What stands for a selection in tokens that clients keep."""
    everything = Selection(
        user_ids=frozenset(_IDS[1:3]),
        labels=frozenset({("team", "blue"), ("größe", "☃")}),
        types=frozenset({domain.CREATED, domain.DELETED}),
        changed_fields=domain.field_bits(("username", "labels")),
        shard_index=3,
        shard_count=8,
    )
    assert everything.short.hex() == "66b71cde2fd42bf2"
    assert Selection(shard_count=2).short.hex() == "b237ebd821f4921c"
    assert EVERYTHING.short == bytes(8)


def test_the_shard_of_a_user_has_vectors() -> None:
    """Those of docs/protocol.md."""
    vectors = {
        "00000000-0000-0000-0000-000000000000": (5, 3),
        "00112233-4455-6677-8899-aabbccddeeff": (3, 1),
        "01a2073c-72ab-73cb-bb17-373d23ea8734": (1, 1),
        "ffffffff-ffff-ffff-ffff-ffffffffffff": (2, 6),
    }
    for text, shards in vectors.items():
        user_id = validation.user_id(text, "id")
        for count, expected in zip((8, 10), shards, strict=True):
            selecting = [
                index for index in range(count) if Selection(shard_index=index, shard_count=count).has_user(user_id, {})
            ]
            assert selecting == [expected], (text, count)
