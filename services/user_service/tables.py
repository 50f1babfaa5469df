"""The tables of the users database, as this release needs them. Migrations bring a database here; `alembic check`
compares.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

SCHEMA_REVISION = "0004"

NAMING = {
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}

metadata = MetaData(naming_convention=NAMING)

users = Table(
    "users",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("username", Text, nullable=False),
    Column("email", Text, nullable=False),
    # What uniqueness of an address is judged by; made by one function, `validation.email_key`.
    Column("email_key", Text, nullable=False),
    Column("display_name", Text, nullable=False, server_default=text("''")),
    Column("locale", Text, nullable=False, server_default=text("''")),
    Column("time_zone", Text, nullable=False, server_default=text("''")),
    Column("labels", JSONB, nullable=False, server_default=text("'{}'")),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("update_time", DateTime(timezone=True), nullable=False),
    Column("delete_time", DateTime(timezone=True)),
    Column("purge_time", DateTime(timezone=True)),
)
living = users.c.delete_time.is_(None)
# text_pattern_ops serves both equality and the prefix filters of ListUsers, in any collation.
Index(
    "users_username_living_key",
    users.c.username,
    unique=True,
    postgresql_where=living,
    postgresql_ops={"username": "text_pattern_ops"},
)
Index(
    "users_email_key_living_key",
    users.c.email_key,
    unique=True,
    postgresql_where=living,
    postgresql_ops={"email_key": "text_pattern_ops"},
)
Index("users_purge_time_idx", users.c.purge_time, postgresql_where=users.c.purge_time.is_not(None))

# One row. Whoever holds its lock may write; its position is that of the newest event.
feed = Table(
    "feed",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False, server_default=text("1")),
    Column("log_id", UUID(as_uuid=True), nullable=False),
    Column("earliest_position", BigInteger, nullable=False, server_default=text("1")),
    Column("head_position", BigInteger, nullable=False, server_default=text("0")),
    Column("head_time", DateTime(timezone=True), nullable=False),
    # The event before earliest_position, the last that retention has removed; NULL while it has removed none.
    Column("edge_event_id", UUID(as_uuid=True)),
    Column("edge_time", DateTime(timezone=True)),
    CheckConstraint("id = 1", name="single"),
)

# The newest events, a row each. Older ones are in segments; an event is in one of the two.
user_events = Table(
    "user_events",
    metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("event_id", UUID(as_uuid=True), nullable=False),
    Column("user_id", UUID(as_uuid=True), nullable=False),
    # CRC-32 of the 16 bytes of user_id: what shards are cut by.
    Column("shard_hash", BigInteger, nullable=False),
    # UserEvent.Type
    Column("type", SmallInteger, nullable=False),
    # Bit n: field number n of User changed.
    Column("changed_fields", Integer, nullable=False),
    # Whether a token may stand after this event: false inside an atomic group.
    Column("group_end", Boolean, nullable=False),
    Column("commit_time", DateTime(timezone=True), nullable=False),
    # The finished element of WatchUsersResponse.events: tag, length, UserEvent without `previous`.
    Column("element", LargeBinary, nullable=False),
    # The User before the change, serialized; NULL for CREATED.
    Column("previous", LargeBinary),
)

# Sealed events, many to a row: `first_position` to `last_position` without a hole, and no group is split.
# The three bytea are stored EXTERNAL: out of line, not compressed.
segments = Table(
    "segments",
    metadata,
    Column("first_position", BigInteger, primary_key=True, autoincrement=False),
    Column("last_position", BigInteger, nullable=False),
    # Commit times of the first and the last event.
    Column("first_time", DateTime(timezone=True), nullable=False),
    Column("last_time", DateTime(timezone=True), nullable=False),
    # Bytes of the three below.
    Column("size", BigInteger, nullable=False),
    # The elements of all its events, joined: the body of a stream's message.
    Column("elements", LargeBinary, nullable=False),
    # The users before the changes, joined.
    Column("previous", LargeBinary, nullable=False),
    # A record of fixed size for each event: see user_service/segments.py.
    Column("records", LargeBinary, nullable=False),
)

# Snapshots that are being sent, or that broke off and may be resumed: what follows `position` is retained until the row
# is gone or has expired.
open_snapshots = Table(
    "open_snapshots",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("expire_time", DateTime(timezone=True), nullable=False),
)

# What was answered to a request_id, so that a retry gets the same.
answers = Table(
    "answers",
    metadata,
    # First in the key: answers are looked up by it alone.
    Column("request_id", UUID(as_uuid=True), primary_key=True),
    Column("caller", Text, primary_key=True),
    Column("method", Text, primary_key=True),
    Column("body_hash", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("create_time", DateTime(timezone=True), nullable=False),
)
# Rows are in the order of time: a BRIN index is next to free and enough to purge by.
Index("answers_create_time_idx", answers.c.create_time, postgresql_using="brin")
