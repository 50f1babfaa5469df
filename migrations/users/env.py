"""Entry of Alembic for the users database."""

from migrations import environment
from user_service import tables

environment.run(tables.metadata)
