"""Users have an email address.

Users that are there already get one that cannot receive mail, made of their username, so that every user has a unique
address from here on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("users", sa.Column("email", sa.Text()))
    op.add_column("users", sa.Column("email_key", sa.Text()))
    op.execute(
        "UPDATE users SET email = username || '@users.invalid', email_key = lower(username) || '@users.invalid'"
        " WHERE email IS NULL"
    )
    op.alter_column("users", "email", nullable=False)
    op.alter_column("users", "email_key", nullable=False)
    op.create_unique_constraint("users_email_key_key", "users", ["email_key"])


def downgrade() -> None:
    op.drop_constraint("users_email_key_key", "users")
    op.drop_column("users", "email_key")
    op.drop_column("users", "email")
