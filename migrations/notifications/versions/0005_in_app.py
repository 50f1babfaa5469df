"""What a user has seen, read and archived, and the identity of the log of notifications.

The release before this one lives with it: what it stores is new to its user.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations import lint, online

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_IN_APP = "'in_app' = ANY (channels)"
_INDEXES = {
    "notifications_in_app_idx": f"{_IN_APP} AND archive_time IS NULL",
    "notifications_unseen_idx": f"{_IN_APP} AND archive_time IS NULL AND seen_time IS NULL",
    "notifications_unread_idx": f"{_IN_APP} AND archive_time IS NULL AND read_time IS NULL",
    "notifications_archived_idx": f"{_IN_APP} AND archive_time IS NOT NULL",
}
_TIMES = ("seen_time", "read_time", "archive_time")


def upgrade() -> None:
    # The indexes below are built in commits of their own, so each step bears being repeated.
    for name in _TIMES:
        op.add_column("notifications", sa.Column(name, sa.DateTime(timezone=True)), if_not_exists=True)
    # Each database draws its own, so it is written into the row; there is one at most.
    lint.accept("adding-field-with-default")
    op.add_column(
        "inbox",
        sa.Column("notification_log_id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "in_app_changes",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="in_app_changes_pkey"),
        if_not_exists=True,
    )
    for name, condition in _INDEXES.items():
        online.create_index(name, "notifications", ["user_id", "position"], postgresql_where=sa.text(condition))


def downgrade() -> None:
    for name in _INDEXES:
        op.drop_index(name, "notifications")
    op.drop_table("in_app_changes")
    op.drop_column("inbox", "notification_log_id")
    for name in _TIMES:
        op.drop_column("notifications", name)
