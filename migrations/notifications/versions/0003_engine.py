"""What the delivery engine keeps: who waits for whom, why a delivery ended, who was asked.

The release before this one lives with it: it does not look at the order, and what waits has no time at which that
release would send it. It counts what is cancelled as delivered.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_EMPTY = sa.text("''")
_ADDED = ("end_reason", "deferred", "behind", "give_up_time", "failed_provider")
_INDEXES = {
    "deliveries_target_due_idx": (["target", "next_attempt_time"], "state = 1 AND channel = 'webhook'"),
    "deliveries_order_idx": (["user_id", "channel", "position"], "state IN (1, 3)"),
    "deliveries_behind_idx": (["behind"], "behind IS NOT NULL"),
}


def upgrade() -> None:
    # The indexes below are built in commits of their own, so each step bears being repeated.
    for column in (
        sa.Column("end_reason", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("deferred", sa.SmallInteger()),
        sa.Column("behind", sa.Uuid()),
        sa.Column("give_up_time", sa.DateTime(timezone=True)),
        sa.Column("failed_provider", sa.Text(), server_default=_EMPTY, nullable=False),
    ):
        op.add_column("deliveries", column, if_not_exists=True)
    op.add_column(
        "attempts", sa.Column("provider", sa.Text(), server_default=_EMPTY, nullable=False), if_not_exists=True
    )
    for name, (columns, condition) in _INDEXES.items():
        online.create_index(name, "deliveries", columns, postgresql_where=sa.text(condition))


def downgrade() -> None:
    # The release before knows no state 5, and nothing that waits: each goes by its own time again.
    op.execute("UPDATE deliveries SET state = 3 WHERE state = 5")
    op.execute("UPDATE deliveries SET next_attempt_time = now() WHERE state = 1 AND next_attempt_time IS NULL")
    for name in _INDEXES:
        op.drop_index(name, "deliveries")
    op.drop_column("attempts", "provider")
    for column in reversed(_ADDED):
        op.drop_column("deliveries", column)
