"""Entry of Alembic for the notifications database."""

from migrations import environment
from notification_service import tables

environment.run(tables.metadata)
