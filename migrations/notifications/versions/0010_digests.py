"""Digests: mails that are gathered, and go out as one.

The release before this one lives with it: it reads none of these tables, and what it stores is in no digest. While it
runs alone digests that are open stay open. A downgrade loses what is gathered and not mailed yet.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_EMPTY = sa.text("''")


def upgrade() -> None:
    # The index on notifications is built in a commit of its own, so each step bears being repeated.
    op.add_column("notifications", sa.Column("digest_id", sa.Uuid()), if_not_exists=True)
    op.create_table(
        "digests",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("category", sa.Text(), nullable=False),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("locale", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("time_zone", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("gathers", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("open_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("close_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("end_time", sa.DateTime(timezone=True)),
        sa.Column("end_reason", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("notification_id", sa.Uuid()),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("event_position", sa.BigInteger(), nullable=False),
        sa.Column("trace_parent", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("trace_state", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.PrimaryKeyConstraint("id", name="digests_pkey"),
        sa.UniqueConstraint("position", name="digests_position_key"),
        sa.CheckConstraint("state IN (1, 2, 3)", name="state"),
        if_not_exists=True,
    )
    for name, columns, condition in (
        ("digests_user_id_position_idx", ["user_id", "position"], None),
        ("digests_name_position_idx", ["name", "position"], None),
        ("digests_due_idx", ["close_time"], "state = 1"),
        ("digests_open_idx", ["state", "position"], "state <> 2"),
        ("digests_notification_idx", ["notification_id"], "notification_id IS NOT NULL"),
    ):
        where = sa.text(condition) if condition else None
        op.create_index(name, "digests", columns, postgresql_where=where, if_not_exists=True)
    op.create_index(
        "digests_gathering_idx",
        "digests",
        ["user_id", "name", "target"],
        unique=True,
        postgresql_where=sa.text("state = 1 AND gathers"),
        if_not_exists=True,
    )
    op.create_table(
        "digest_items",
        sa.Column("digest_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("notification_id", sa.Uuid(), nullable=False),
        sa.Column("view", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest_id", "number", name="digest_items_pkey"),
        sa.UniqueConstraint("notification_id", "digest_id", name="digest_items_notification_id_digest_id_key"),
        sa.ForeignKeyConstraint(["digest_id"], ["digests.id"], name="digest_items_digest_id_fkey", ondelete="CASCADE"),
        if_not_exists=True,
    )
    online.create_index(
        "notifications_digest_idx", "notifications", ["digest_id"], postgresql_where=sa.text("digest_id IS NOT NULL")
    )


def downgrade() -> None:
    op.drop_table("digest_items")
    op.drop_table("digests")
    op.drop_column("notifications", "digest_id")
