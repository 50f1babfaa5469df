"""The Alembic environment of the users database."""
