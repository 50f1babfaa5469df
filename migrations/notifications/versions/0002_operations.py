"""Parked deliveries can be tried again or discarded, and who did it is kept.

The release before this one lives with it: to its dispatcher a delivery that is tried again has had all its tries, and
is parked again should that release come across it first. It counts what is discarded as delivered.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("tries_before", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.create_table(
        "delivery_operations",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("delivery_id", "id", name="delivery_operations_pkey"),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["deliveries.id"], name="delivery_operations_delivery_id_fkey", ondelete="CASCADE"
        ),
        sa.CheckConstraint("kind IN (1, 2)", name="kind"),
    )


def downgrade() -> None:
    # The release before knows no state 4; what was discarded is again what it was.
    op.execute("UPDATE deliveries SET state = 3 WHERE state = 4")
    op.drop_table("delivery_operations")
    op.drop_column("deliveries", "tries_before")
