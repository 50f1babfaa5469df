"""How sealed events are packed: the joined elements of many events in one row, ready to be a message's body, and for
each event a record of fixed size with what else the feed must know of it.

Postgres packs (`packed`), so that sealing takes no event through this process, and Python unpacks (`unpack`). Both
follow `_LAYOUT`, which must stay as it is for as long as rows are kept that were packed by it. The n-th event of a
segment has the position `first_position` + n and the n-th record. The columns are stored as they are, out of line and
not compressed: Postgres then reads one record (`nth_record`) without the rest. Its own compression took three tenths of
the room, a fifth longer to read and twice as long to write, and LZ4 is not in every build of Postgres.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Integer, LargeBinary, func, literal_column
from sqlalchemy.dialects.postgresql import UUID, aggregate_order_by

from user_service.events import Entry
from user_service.tables import segments

_NO_PREVIOUS = -1

# Of each field of a record: how Python reads it, and how Postgres writes it, given the columns of user_events.
# Big-endian, without padding.
_LAYOUT: tuple[tuple[str, Callable[[Any], ColumnElement[Any]]], ...] = (
    ("16s", lambda event: func.uuid_send(event.event_id)),
    ("16s", lambda event: func.uuid_send(event.user_id)),
    ("h", lambda event: func.int2send(event.type)),
    ("i", lambda event: func.int4send(event.changed_fields)),
    ("?", lambda event: func.boolsend(event.group_end)),
    # Microseconds since 2000.
    ("q", lambda event: func.timestamptz_send(event.commit_time)),
    # The lengths of its parts of `elements` and `previous`.
    ("i", lambda event: func.int4send(func.octet_length(event.element))),
    (
        "i",
        lambda event: func.int4send(
            func.coalesce(func.octet_length(event.previous), literal_column(str(_NO_PREVIOUS)))
        ),
    ),
)
_RECORD = struct.Struct("!" + "".join(code for code, _ in _LAYOUT))
RECORD_SIZE = _RECORD.size
_SIZE: ColumnElement[int] = literal_column(str(RECORD_SIZE))

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_NOTHING: ColumnElement[bytes] = literal_column("''::bytea", LargeBinary())


def packed(events: FromClause) -> dict[str, ColumnElement[Any]]:
    """The columns of a segment as aggregates over its events, which have the columns of user_events."""
    in_order = aggregate_order_by(_NOTHING, events.c.position)
    records: ColumnElement[Any] = _NOTHING
    for _, written in _LAYOUT:
        records = records.op("||")(written(events.c))
    return {
        "elements": func.string_agg(events.c.element, in_order),
        "previous": func.coalesce(func.string_agg(events.c.previous, in_order), _NOTHING),
        "records": func.string_agg(records, in_order),
    }


def nth_record(position: ColumnElement[int]) -> ColumnElement[bytes]:
    """The record of the event at a position of a segment, for `identity`."""
    start = (position - segments.c.first_position) * _SIZE + literal_column("1")
    return func.substring(segments.c.records, start.cast(Integer()), _SIZE)


def last_event_id() -> ColumnElement[Any]:
    """The id of a segment's last event."""
    start = func.octet_length(segments.c.records) - _SIZE + literal_column("1")
    return func.encode(func.substring(segments.c.records, start, literal_column("16")), literal_column("'hex'")).cast(
        UUID
    )


def identity(record: bytes) -> tuple[bytes, datetime]:
    """The id and the commit time of the event that a record is of."""
    event_id, _, _, _, _, time, _, _ = _RECORD.unpack(record)
    return event_id, _EPOCH + timedelta(microseconds=time)


def unpack(first_position: int, elements: bytes, previous: bytes, records: bytes) -> list[Entry]:
    """The events of a segment."""
    found = []
    position, start, before = first_position, 0, 0
    for event_id, user_id, kind, fields, group_end, time, length, previous_length in _RECORD.iter_unpack(records):
        user_before = None
        if previous_length != _NO_PREVIOUS:
            user_before = previous[before : before + previous_length]
            before += previous_length
        element = elements[start : start + length]
        committed = _EPOCH + timedelta(microseconds=time)
        found.append(Entry(position, event_id, group_end, committed, element, user_before, user_id, kind, fields))
        position += 1
        start += length
    return found
