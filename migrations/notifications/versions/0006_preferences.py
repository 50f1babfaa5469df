"""Who wants what: preferences, suppressed addresses, decisions.

The release before this one lives with it: it reads none of these tables.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_EMPTY = sa.text("''")


def upgrade() -> None:
    op.add_column("notifications", sa.Column("time_zone", sa.Text(), server_default=_EMPTY, nullable=False))
    op.create_table(
        "preferences",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("document", JSONB(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="preferences_pkey"),
    )
    op.create_table(
        "suppressions",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("actor", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("channel", "target", name="suppressions_pkey"),
    )
    op.create_table(
        "delivery_decisions",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("detail", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("delivery_id", "id", name="delivery_decisions_pkey"),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["deliveries.id"], name="delivery_decisions_delivery_id_fkey", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    for table in ("delivery_decisions", "suppressions", "preferences"):
        op.drop_table(table)
    op.drop_column("notifications", "time_zone")
