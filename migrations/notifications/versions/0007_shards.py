"""The feed's shards are followed by leases.

The release before this one goes on by the row of `inbox`, which this one keeps while the feed is one shard. While it is
several, that row has a token that the user service refuses: a release that knows no shards then stops, and says so.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ZERO = sa.text("0")


def upgrade() -> None:
    op.create_table(
        "shards",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("of", sa.Integer(), nullable=False),
        sa.Column("log_id", sa.Uuid()),
        sa.Column("resume_token", sa.Text()),
        sa.Column("position", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("position_time", sa.DateTime(timezone=True)),
        sa.Column("head_position", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("floors", postgresql.JSONB()),
        sa.Column("owner", sa.Uuid()),
        sa.Column("epoch", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("shard", name="shards_pkey"),
        sa.CheckConstraint("shard BETWEEN 0 AND of - 1", name="shard"),
        postgresql_with={"fillfactor": 50},
    )
    op.create_table(
        "replicas",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("shards", sa.Integer(), nullable=False),
        sa.Column("join_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="replicas_pkey"),
        postgresql_with={"fillfactor": 50},
    )


def downgrade() -> None:
    op.drop_table("replicas")
    op.drop_table("shards")
