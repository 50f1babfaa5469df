"""Users have an email address.

Users that are there already get one that can receive no mail. It is made of their id: usernames that differ only in
case, or that are no local part of an address, are allowed so far. Writers go on meanwhile; those that know no address
are refused once all rows have one.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from migrations import lint, online

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_users = sa.table("users", sa.column("id", sa.Uuid()), sa.column("email", sa.Text()), sa.column("email_key", sa.Text()))
_GIVEN = "users_email_given_check"


def upgrade() -> None:
    for column in ("email", "email_key"):
        op.add_column("users", sa.Column(column, sa.Text()), if_not_exists=True)
    with online.own_commits():
        _fill()
    lint.accept("ban-drop-constraint")  # of an earlier try of this revision
    op.execute(f"ALTER TABLE users DROP CONSTRAINT IF EXISTS {_GIVEN}")
    op.execute(
        f"ALTER TABLE users ADD CONSTRAINT {_GIVEN} CHECK (email IS NOT NULL AND email_key IS NOT NULL) NOT VALID"
    )
    with online.own_commits():
        # Rows that were written between the end of the first round and the constraint.
        _fill()
        op.execute(f"ALTER TABLE users VALIDATE CONSTRAINT {_GIVEN}")
    online.create_index("users_email_key_key", "users", ["email_key"], unique=True)
    # The valid constraint spares these the scan of the table under their lock.
    op.alter_column("users", "email", nullable=False)
    op.alter_column("users", "email_key", nullable=False)
    lint.accept("ban-drop-constraint")  # the columns say it themselves now
    op.execute(f"ALTER TABLE users DROP CONSTRAINT {_GIVEN}")
    op.execute("ALTER TABLE users ADD CONSTRAINT users_email_key_key UNIQUE USING INDEX users_email_key_key")


def _fill() -> None:
    if context.is_offline_mode():
        return
    missing = _users.c.email.is_(None)
    address = sa.cast(_users.c.id, sa.Text()) + "@users.invalid"
    for rows in online.chunks(sa.select(_users.c.id).where(missing), _users.c.id):
        between = _users.c.id.between(rows[0].id, rows[-1].id)
        op.get_bind().execute(sa.update(_users).where(between, missing).values(email=address, email_key=address))


def downgrade() -> None:
    op.drop_constraint("users_email_key_key", "users")
    op.drop_column("users", "email_key")
    op.drop_column("users", "email")
