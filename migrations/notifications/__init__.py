"""The Alembic environment of the notifications database."""
