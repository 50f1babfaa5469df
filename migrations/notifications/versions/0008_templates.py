"""A notification remembers the templates it was rendered with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("template_version", "locale"):
        op.add_column("notifications", sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False))


def downgrade() -> None:
    op.drop_column("notifications", "locale")
    op.drop_column("notifications", "template_version")
