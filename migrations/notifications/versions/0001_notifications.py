"""Notifications: what was made of the feed, and its deliveries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_EMPTY = sa.text("''")
_ZERO = sa.text("0")


def upgrade() -> None:
    op.create_table(
        "inbox",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, server_default=sa.text("1"), nullable=False),
        sa.Column("log_id", sa.Uuid()),
        sa.Column("resume_token", sa.Text()),
        sa.Column("position", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("position_time", sa.DateTime(timezone=True)),
        sa.Column("notification_position", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("delivery_position", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="inbox_pkey"),
        sa.CheckConstraint("id = 1", name="single"),
    )
    op.create_table(
        "notifications",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("event_position", sa.BigInteger(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("category", sa.Text(), nullable=False),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("channels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("subject", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("body", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("trace_parent", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("trace_state", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.PrimaryKeyConstraint("id", name="notifications_pkey"),
        sa.UniqueConstraint("position", name="notifications_position_key"),
        sa.UniqueConstraint("event_id", "rule", name="notifications_event_id_rule_key"),
    )
    op.create_index("notifications_user_id_position_idx", "notifications", ["user_id", "position"])
    op.create_index("notifications_category_position_idx", "notifications", ["category", "position"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("notification_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("tries", sa.Integer(), server_default=_ZERO, nullable=False),
        sa.Column("next_attempt_time", sa.DateTime(timezone=True)),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True)),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("trace_parent", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("trace_state", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.PrimaryKeyConstraint("id", name="deliveries_pkey"),
        sa.UniqueConstraint("position", name="deliveries_position_key"),
        sa.UniqueConstraint(
            "notification_id", "channel", "target", name="deliveries_notification_id_channel_target_key"
        ),
        sa.ForeignKeyConstraint(
            ["notification_id"], ["notifications.id"], name="deliveries_notification_id_fkey", ondelete="CASCADE"
        ),
        postgresql_with={"fillfactor": 80},
    )
    op.create_index("deliveries_user_id_position_idx", "deliveries", ["user_id", "position"])
    op.create_index("deliveries_channel_position_idx", "deliveries", ["channel", "position"])
    op.create_index(
        "deliveries_due_idx", "deliveries", ["channel", "next_attempt_time"], postgresql_where=sa.text("state = 1")
    )
    op.create_index("deliveries_open_idx", "deliveries", ["state", "position"], postgresql_where=sa.text("state <> 2"))
    op.create_table(
        "contents",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("delivery_id", name="contents_pkey"),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["deliveries.id"], name="contents_delivery_id_fkey", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "attempts",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("outcome", sa.SmallInteger(), server_default=sa.text("4"), nullable=False),
        sa.Column("code", sa.Integer(), server_default=_ZERO, nullable=False),
        sa.Column("detail", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("delivery_id", "number", name="attempts_pkey"),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["deliveries.id"], name="attempts_delivery_id_fkey", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    for table in ("attempts", "contents", "deliveries", "notifications", "inbox"):
        op.drop_table(table)
