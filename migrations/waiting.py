"""Waits for a schema that the services of this release can use, as each of them does before it serves.

For the init container of a pod: it can be seen from outside, and ends with a reason after a while.
"""

from __future__ import annotations

import asyncio

import notification_service.tables
import user_service.tables
from migrations.runner import MigrationError, Target
from migrations.settings import MigrationSettings
from servicekit import schema

# What the services ask for, which is not always the newest revision: one that only takes away is not needed.
REQUIRED = {
    "users": user_service.tables.SCHEMA_REVISION,
    "notifications": notification_service.tables.SCHEMA_REVISION,
}


def wait(target: Target, settings: MigrationSettings) -> None:
    """Returns once a database is at the revision that its service needs, or newer. Raises MigrationError."""
    required = REQUIRED[target.name]
    try:
        asyncio.run(schema.wait(target.url, "tidings-migrations", required, timeout=settings.schema_wait))
    except schema.NoSchemaError as error:
        raise MigrationError(
            f"{target.name}: {error}; waited {settings.schema_wait:g} s for {required} or newer: "
            "have the migrations run, and did they succeed?"
        ) from None
