"""Whatever the groups of a log, what is selected and when it arrives: the messages of a stream are one chain."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from tidings.users.v1 import users_pb2
from user_service import domain, events, tokens
from user_service.events import Entry
from user_service.messages import Messages
from user_service.selection import EVERYTHING, Selection
from user_service.track import Track
from user_service.window import Window

_TIME = datetime(2030, 1, 1, tzinfo=UTC)
_SELECTIONS = (Selection(types=frozenset({domain.CREATED})), EVERYTHING)


def _entry(position: int, group_end: bool, chosen: bool, size: int) -> Entry:
    kind = domain.CREATED if chosen else domain.UPDATED
    body = users_pb2.UserEvent(position=position, type=kind, actor="x" * size).SerializeToString()
    return Entry(position, position.to_bytes(16, "big"), group_end, _TIME, events.element(body), None, b"", kind, 0)


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.sampled_from([0, 0, 0, 600_000])), min_size=1, max_size=5)),
    st.lists(st.integers(1, 12), max_size=30),
    st.sampled_from(_SELECTIONS),
    st.sampled_from([1, 2, 1000]),
)
async def test_the_messages_of_a_stream_are_one_chain(
    groups: list[list[tuple[bool, int]]], arrivals: list[int], selection: Selection, max_batch: int
) -> None:
    # A log of groups, of whose events some are chosen and some fill half a message.
    log: list[Entry] = []
    for group in groups:
        for number, (chosen, size) in enumerate(group, 1):
            log.append(_entry(len(log) + 1, number == len(group), chosen or not selection.digest, size))
    chosen_positions = [entry.position for entry in log if entry.type == domain.CREATED]
    ends = {0, *(entry.position for entry in log if entry.group_end)}
    window = Window(1 << 30)
    messages = Messages(uuid.UUID(int=1), None, window, readers=1, cache_bytes=1 << 20)
    track, scanned, wire, sent = Track(10.0, 0, "", 0), 0, 0, 0
    for count in (*arrivals, len(log)):
        window.append(log[window.head : window.head + count])
        while scanned < window.head:
            message = await messages.after(scanned, selection, max_batch, False)
            assert scanned < message.scanned <= window.head
            scanned = message.scanned
            data = track.take(message)
            if data:
                received = users_pb2.WatchUsersResponse.FromString(data)
                assert received.previous_position == wire
                assert len(data) < 1 << 20
                positions = [event.position for event in received.events]
                assert positions == chosen_positions[sent : sent + len(positions)]
                assert 1 <= len(positions) <= max_batch
                sent += len(positions)
                wire = received.position
                assert positions[-1] <= wire <= scanned
                assert bool(received.resume_token) == (not track.inside_group)
            # The token stands at the last end of a group that was looked at, unless what was sent goes beyond it.
            resting = max(end for end in ends if end <= scanned)
            assert track.inside_group == (resting < (chosen_positions[sent - 1] if sent else 0))
            if not track.inside_group:
                assert track.position == resting
                assert not track.token or tokens.decode(track.token).position == resting
    assert sent == len(chosen_positions)
    assert not track.inside_group
    assert track.position == len(log)
