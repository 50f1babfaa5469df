"""The feed: every change of a user is an event with a dense position.

Users that are there already become its first events, in the order of their ids, so that a subscriber from the earliest
position sees them all. The encoding of an element is that of this revision, on purpose not shared with the service.
All of it is one transaction that keeps users locked: a user written meanwhile would be missing from the feed. So would
one written afterwards by a writer that knows no feed; such a writer is refused, for update_time has no default.
"""

from __future__ import annotations

import zlib
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql
from uuid_utils.compat import uuid7

from migrations import lint, online
from tidings.users.v1 import users_pb2

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_users = sa.table(
    "users",
    sa.column("id", sa.Uuid()),
    sa.column("username", sa.Text()),
    sa.column("email", sa.Text()),
    sa.column("create_time", sa.DateTime(timezone=True)),
    sa.column("update_time", sa.DateTime(timezone=True)),
)
_feed = sa.table(
    "feed", sa.column("head_position", sa.BigInteger()), sa.column("head_time", sa.DateTime(timezone=True))
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
)
_CREATED = 1
# Bits of the field numbers of username and email.
_CHANGED_FIELDS = 1 << 2 | 1 << 3


def upgrade() -> None:
    _widen_users()
    _create_feed()
    if not context.is_offline_mode():
        _tell_of_users()
    _index_living()


def _widen_users() -> None:
    # The service gives every time itself, that of the commit. Writers from before are refused, see above.
    lint.accept("ban-drop-default")
    op.alter_column("users", "create_time", server_default=None)
    op.add_column("users", sa.Column("display_name", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("users", sa.Column("locale", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("users", sa.Column("time_zone", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("users", sa.Column("labels", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False))
    op.add_column("users", sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False))
    # A constant default fills existing rows without rewriting the table; those are then given what it should be.
    now = sa.text("now()")
    op.add_column("users", sa.Column("update_time", sa.DateTime(timezone=True), server_default=now, nullable=False))
    lint.accept("ban-drop-default")
    op.alter_column("users", "update_time", server_default=None)
    op.add_column("users", sa.Column("delete_time", sa.DateTime(timezone=True)))
    op.add_column("users", sa.Column("purge_time", sa.DateTime(timezone=True)))
    # Names are unique among the living from here on.
    for name in ("users_username_key", "users_email_key_key"):
        lint.accept("ban-drop-constraint")
        op.drop_constraint(name, "users")


def _index_living() -> None:
    # After the rows were updated, so that no update has to maintain them.
    living = sa.text("delete_time IS NULL")
    # Not built concurrently: the table is locked for its events anyway.
    for column in ("username", "email_key"):
        lint.accept("require-concurrent-index-creation")
        op.create_index(
            f"users_{column}_living_key",
            "users",
            [column],
            unique=True,
            postgresql_where=living,
            postgresql_ops={column: "text_pattern_ops"},
        )
    lint.accept("require-concurrent-index-creation")
    op.create_index("users_purge_time_idx", "users", ["purge_time"], postgresql_where=sa.text("purge_time IS NOT NULL"))


def _create_feed() -> None:
    op.create_table(
        "feed",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, server_default=sa.text("1"), nullable=False),
        sa.Column("log_id", sa.Uuid(), nullable=False),
        sa.Column("earliest_position", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("head_position", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("head_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="feed_pkey"),
        sa.CheckConstraint("id = 1", name="single"),
        # The row is updated by every group commit: room for updates on its page, and vacuum at once.
        postgresql_with={
            "fillfactor": 10,
            "autovacuum_vacuum_scale_factor": 0,
            "autovacuum_vacuum_threshold": 200,
            "autovacuum_vacuum_cost_delay": 0,
        },
    )
    op.execute("INSERT INTO feed (log_id, head_time) VALUES (gen_random_uuid(), clock_timestamp())")
    op.create_table(
        "user_events",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("shard_hash", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.SmallInteger(), nullable=False),
        sa.Column("changed_fields", sa.Integer(), nullable=False),
        sa.Column("group_end", sa.Boolean(), nullable=False),
        sa.Column("commit_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("element", sa.LargeBinary(), nullable=False),
        sa.Column("previous", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("position", name="user_events_pkey"),
    )
    op.create_table(
        "answers",
        sa.Column("request_id", sa.Uuid(), nullable=False),
        sa.Column("caller", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.LargeBinary(), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "caller", "method", name="answers_pkey"),
    )
    op.create_index("answers_create_time_idx", "answers", ["create_time"], postgresql_using="brin")


def _tell_of_users() -> None:
    connection = op.get_bind()
    # One commit time for all: it never falls along a log, and their times of creation need not be in the order of ids.
    now: datetime = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    position = 0
    query = sa.select(_users.c.id, _users.c.username, _users.c.email, _users.c.create_time)
    for rows in online.chunks(query, _users.c.id):
        between = _users.c.id.between(rows[0].id, rows[-1].id)
        connection.execute(sa.update(_users).where(between).values(update_time=_users.c.create_time))
        events = [
            _event(number, row.id, row.username, row.email, row.create_time, now)
            for number, row in enumerate(rows, position + 1)
        ]
        connection.execute(sa.insert(_user_events), events)
        position += len(rows)
    if position:
        connection.execute(sa.update(_feed).values(head_position=position, head_time=now))


def _event(
    position: int, user_id: Any, username: str, email: str, create_time: datetime, now: datetime
) -> dict[str, Any]:
    event_id = uuid7()
    event = users_pb2.UserEvent(
        position=position,
        id=str(event_id),
        type=users_pb2.UserEvent.CREATED,
        changed_fields=["username", "email"],
    )
    event.commit_time.FromDatetime(now)
    event.user.id, event.user.username, event.user.email, event.user.version = str(user_id), username, email, 1
    event.user.create_time.FromDatetime(create_time.astimezone(UTC))
    event.user.update_time.CopyFrom(event.user.create_time)
    body = event.SerializeToString()
    return {
        "position": position,
        "event_id": event_id,
        "user_id": user_id,
        "shard_hash": zlib.crc32(user_id.bytes),
        "type": _CREATED,
        "changed_fields": _CHANGED_FIELDS,
        "group_end": True,
        "commit_time": now,
        "element": b"\x0a" + _varint(len(body)) + body,
    }


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def downgrade() -> None:
    for table in ("answers", "user_events", "feed"):
        op.drop_table(table)
    for index in ("users_purge_time_idx", "users_email_key_living_key", "users_username_living_key"):
        op.drop_index(index, "users")
    # Names of soft-deleted users may be taken by others now.
    op.execute("DELETE FROM users WHERE delete_time IS NOT NULL")
    op.create_unique_constraint("users_username_key", "users", ["username"])
    op.create_unique_constraint("users_email_key_key", "users", ["email_key"])
    for column in (
        "purge_time", "delete_time", "update_time", "version", "labels", "time_zone", "locale", "display_name",
    ):  # fmt: skip
        op.drop_column("users", column)
    op.alter_column("users", "create_time", server_default=sa.text("now()"))
