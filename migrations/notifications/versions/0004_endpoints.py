"""Webhook endpoints that are made by the API, and their secrets.

The release before this one knows neither: to its webhook channel a delivery to `endpoints/<id>` is one to an endpoint
that is no longer configured, and is parked.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "endpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("events", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("categories", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("disable_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("disable_time", sa.DateTime(timezone=True)),
        sa.Column("rate_limit", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request_id", sa.Uuid()),
        sa.Column("request_hash", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("id", name="endpoints_pkey"),
        sa.UniqueConstraint("position", name="endpoints_position_key"),
        sa.UniqueConstraint("name", name="endpoints_name_key"),
        sa.UniqueConstraint("request_id", name="endpoints_request_id_key"),
        sa.CheckConstraint("state IN (1, 2)", name="state"),
    )
    op.create_table(
        "endpoint_secrets",
        sa.Column("endpoint_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("is_first", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("endpoint_id", "id", name="endpoint_secrets_pkey"),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["endpoints.id"], name="endpoint_secrets_endpoint_id_fkey", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    op.drop_table("endpoint_secrets")
    op.drop_table("endpoints")
