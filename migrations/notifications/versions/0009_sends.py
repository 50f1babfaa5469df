"""Notifications that callers send, and this service's own copy of the users.

The release before this one lives with it: what it stores is sent by no call.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations import online

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_EMPTY, _ZERO, _NOW = sa.text("''"), sa.text("0"), sa.text("now()")
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    # The index below is built in commits of its own, so each step bears being repeated.
    op.add_column("notifications", sa.Column("send_id", sa.Uuid()), if_not_exists=True)
    op.create_table(
        "recipients",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.Text()) for name in ("username", "email", "display_name", "locale", "time_zone")),
        sa.Column("labels", postgresql.JSONB()),
        *(sa.Column(name, _TIME) for name in ("create_time", "update_time", "delete_time")),
        sa.Column("snapshot", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="recipients_pkey"),
        if_not_exists=True,
    )
    op.create_table(
        "recipients_feed",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, server_default=sa.text("1"), nullable=False),
        sa.Column("log_id", sa.Uuid()),
        sa.Column("resume_token", sa.Text()),
        sa.Column("position", sa.BigInteger()),
        *(
            sa.Column(name, sa.BigInteger(), server_default=_ZERO, nullable=False)
            for name in ("head_position", "snapshot", "history")
        ),
        sa.Column("inside", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("owner", sa.Uuid()),
        sa.Column("epoch", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("lease_until", _TIME),
        sa.Column("update_time", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="recipients_feed_pkey"),
        sa.CheckConstraint("id = 1", name="single"),
        postgresql_with={"fillfactor": 50},
        if_not_exists=True,
    )
    op.create_table(
        "sends",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("template", "category")),
        sa.Column("channels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("params", postgresql.JSONB(), nullable=False),
        sa.Column("user_ids", postgresql.ARRAY(sa.Uuid())),
        sa.Column("filter", postgresql.JSONB()),
        sa.Column("send_time", _TIME, nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("failure", sa.Text(), server_default=_EMPTY, nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), server_default=_ZERO, nullable=False)
            for name in ("matched", "made", "unknown", "deleted", "no_address", "not_composed")
        ),
        sa.Column("unknown_ids", postgresql.ARRAY(sa.Uuid()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("passed", sa.Uuid()),
        sa.Column("log_id", sa.Uuid()),
        sa.Column("feed_position", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default=_ZERO, nullable=False),
        sa.Column("lease_until", _TIME),
        sa.Column("turn_time", _TIME),
        sa.Column("settled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("actor", sa.Text(), server_default=_EMPTY, nullable=False),
        sa.Column("request_id", sa.Uuid(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        *(
            sa.Column(name, sa.Text(), server_default=_EMPTY, nullable=False)
            for name in ("trace_parent", "trace_state")
        ),
        sa.Column("create_time", _TIME, nullable=False),
        *(sa.Column(name, _TIME) for name in ("start_time", "end_time")),
        sa.PrimaryKeyConstraint("id", name="sends_pkey"),
        sa.UniqueConstraint("position", name="sends_position_key"),
        sa.UniqueConstraint("actor", "request_id", name="sends_actor_request_id_key"),
        sa.CheckConstraint("state BETWEEN 1 AND 5", name="state"),
        postgresql_with={"fillfactor": 50},
        if_not_exists=True,
    )
    for name in ("state", "category", "actor"):
        op.create_index(f"sends_{name}_position_idx", "sends", [name, "position"], if_not_exists=True)
    op.create_index(
        "sends_due_idx", "sends", ["send_time"], postgresql_where=sa.text("state IN (1, 2)"), if_not_exists=True
    )
    op.create_index(
        "sends_unsettled_idx",
        "sends",
        ["id"],
        postgresql_where=sa.text("state = 4 AND NOT settled"),
        if_not_exists=True,
    )
    online.create_index(
        "notifications_send_idx",
        "notifications",
        ["send_id", "position"],
        postgresql_where=sa.text("send_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("notifications_send_idx", "notifications")
    for table in ("sends", "recipients_feed", "recipients"):
        op.drop_table(table)
    op.drop_column("notifications", "send_id")
