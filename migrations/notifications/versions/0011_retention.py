"""What is no longer kept is removed: how it is found, and what has to be known of it.

The release before this one lives with it: it removes nothing, and counts deliveries that were removed without having
been delivered among those that were.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The indexes are built in commits of their own, so each step bears being repeated.
    op.add_column(
        "inbox",
        sa.Column("removed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        if_not_exists=True,
    )
    op.add_column("recipients", sa.Column("delete_position", sa.BigInteger()), if_not_exists=True)
    for name, table, column in (
        ("recipients_deleted_idx", "recipients", "delete_time"),
        ("sends_ended_idx", "sends", "end_time"),
        ("digests_ended_idx", "digests", "end_time"),
    ):
        online.create_index(name, table, [column], postgresql_where=sa.text(f"{column} IS NOT NULL"))


def downgrade() -> None:
    op.drop_index("digests_ended_idx", "digests")
    op.drop_index("sends_ended_idx", "sends")
    op.drop_index("recipients_deleted_idx", "recipients")
    op.drop_column("recipients", "delete_position")
    op.drop_column("inbox", "removed")
