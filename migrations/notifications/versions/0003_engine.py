"""What the delivery engine keeps: who waits for whom, why a delivery ended, who was asked.

The release before this one lives with it: it does not look at the order, and what waits has no time at which that
release would send it. It counts what is cancelled as delivered.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_EMPTY = sa.text("''")
_ADDED = ("end_reason", "deferred", "behind", "give_up_time", "failed_provider")


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("end_reason", sa.Text(), server_default=_EMPTY, nullable=False))
    op.add_column("deliveries", sa.Column("deferred", sa.SmallInteger()))
    op.add_column("deliveries", sa.Column("behind", sa.Uuid()))
    op.add_column("deliveries", sa.Column("give_up_time", sa.DateTime(timezone=True)))
    op.add_column("deliveries", sa.Column("failed_provider", sa.Text(), server_default=_EMPTY, nullable=False))
    op.add_column("attempts", sa.Column("provider", sa.Text(), server_default=_EMPTY, nullable=False))
    op.create_index(
        "deliveries_target_due_idx",
        "deliveries",
        ["target", "next_attempt_time"],
        postgresql_where=sa.text("state = 1 AND channel = 'webhook'"),
    )
    op.create_index(
        "deliveries_order_idx",
        "deliveries",
        ["user_id", "channel", "position"],
        postgresql_where=sa.text("state IN (1, 3)"),
    )
    op.create_index("deliveries_behind_idx", "deliveries", ["behind"], postgresql_where=sa.text("behind IS NOT NULL"))


def downgrade() -> None:
    # The release before knows no state 5, and nothing that waits: each goes by its own time again.
    op.execute("UPDATE deliveries SET state = 3 WHERE state = 5")
    op.execute("UPDATE deliveries SET next_attempt_time = now() WHERE state = 1 AND next_attempt_time IS NULL")
    for index in ("deliveries_behind_idx", "deliveries_order_idx", "deliveries_target_due_idx"):
        op.drop_index(index, "deliveries")
    op.drop_column("attempts", "provider")
    for column in reversed(_ADDED):
        op.drop_column("deliveries", column)
