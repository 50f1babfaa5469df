"""Segments: old events are sealed, many to a row, and removed when their time is over.

Nothing is sealed here: the service does it, event by event of what is there. Going back puts every sealed event into
user_events again; the record's layout is that of this revision, on purpose not shared with the service. Events that
retention has removed stay removed.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from alembic import context, op

from migrations import online

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_segments = sa.table(
    "segments",
    sa.column("first_position", sa.BigInteger()),
    sa.column("elements", sa.LargeBinary()),
    sa.column("previous", sa.LargeBinary()),
    sa.column("records", sa.LargeBinary()),
)
_user_events = sa.table(
    "user_events",
    sa.column("position", sa.BigInteger()),
    sa.column("event_id", sa.Uuid()),
    sa.column("user_id", sa.Uuid()),
    sa.column("shard_hash", sa.BigInteger()),
    sa.column("type", sa.SmallInteger()),
    sa.column("changed_fields", sa.Integer()),
    sa.column("group_end", sa.Boolean()),
    sa.column("commit_time", sa.DateTime(timezone=True)),
    sa.column("element", sa.LargeBinary()),
    sa.column("previous", sa.LargeBinary()),
)
# event_id, user_id, type, changed_fields, group_end, commit_time in microseconds since 2000, length of the element, and
# of the user before, -1 for none
_RECORD = struct.Struct("!16s16shi?qii")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

# user_events is a queue: rows come at one end and leave at the other, and a fifth of it, at which autovacuum usually
# starts, is soon passed. The share spares a table that was never sealed before a vacuum every ten thousand of its rows.
_QUEUE = {
    "autovacuum_vacuum_threshold": 10_000,
    "autovacuum_vacuum_scale_factor": 0.02,
    "autovacuum_vacuum_cost_delay": 0,
}


def upgrade() -> None:
    op.create_table(
        "segments",
        sa.Column("first_position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("last_position", sa.BigInteger(), nullable=False),
        sa.Column("first_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("elements", sa.LargeBinary(), nullable=False),
        sa.Column("previous", sa.LargeBinary(), nullable=False),
        sa.Column("records", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("first_position", name="segments_pkey"),
    )
    for column in ("elements", "previous", "records"):
        op.execute(f"ALTER TABLE segments ALTER COLUMN {column} SET STORAGE EXTERNAL")
    op.create_table(
        "open_snapshots",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="open_snapshots_pkey"),
    )
    op.add_column("feed", sa.Column("edge_event_id", sa.Uuid()))
    op.add_column("feed", sa.Column("edge_time", sa.DateTime(timezone=True)))
    op.execute(f"ALTER TABLE user_events SET ({', '.join(f'{name} = {value}' for name, value in _QUEUE.items())})")


def downgrade() -> None:
    op.execute(f"ALTER TABLE user_events RESET ({', '.join(_QUEUE)})")
    if not context.is_offline_mode():
        _unseal()
    for table in ("open_snapshots", "segments"):
        op.drop_table(table)
    for column in ("edge_event_id", "edge_time"):
        op.drop_column("feed", column)


def _unseal() -> None:
    connection = op.get_bind()
    for rows in online.chunks(sa.select(*_segments.c), _segments.c.first_position, size=10):
        for row in rows:
            events = _events(row.first_position, row.elements, row.previous, row.records)
            connection.execute(sa.insert(_user_events), list(events))


def _events(position: int, elements: bytes, previous: bytes, records: bytes) -> Iterator[dict[str, Any]]:
    start = before = 0
    for event_id, user_id, kind, fields, group_end, time, length, previous_length in _RECORD.iter_unpack(records):
        yield {
            "position": position,
            "event_id": uuid.UUID(bytes=event_id),
            "user_id": uuid.UUID(bytes=user_id),
            "shard_hash": zlib.crc32(user_id),
            "type": kind,
            "changed_fields": fields,
            "group_end": group_end,
            "commit_time": _EPOCH + timedelta(microseconds=time),
            "element": elements[start : start + length],
            "previous": None if previous_length < 0 else previous[before : before + previous_length],
        }
        position += 1
        start += length
        before += max(previous_length, 0)
