"""What both Alembic environments do: run revisions one transaction each, on the runner's connection or as SQL text."""

from __future__ import annotations

from alembic import context
from sqlalchemy import MetaData

from servicekit.schema import VERSION_TABLE


def run(metadata: MetaData) -> None:
    """The body of an `env.py`. The runner passes its connection and its hook in the config's attributes."""
    attributes = context.config.attributes
    if context.is_offline_mode():
        context.configure(dialect_name="postgresql", target_metadata=metadata, transaction_per_migration=True)
    else:
        context.configure(
            connection=attributes["connection"],
            target_metadata=metadata,
            version_table=VERSION_TABLE,
            transaction_per_migration=True,
            compare_type=True,
            compare_server_default=True,
            on_version_apply=attributes.get("on_version_apply"),
        )
    with context.begin_transaction():
        context.run_migrations()
