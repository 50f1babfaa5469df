"""Settings of the migrations: `TIDINGS_MIGRATIONS_*`, and the databases' URLs under the names that the services use."""

from __future__ import annotations

import os

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict

from servicekit.settings import InvalidSettingsError, Settings


class MigrationSettings(Settings):
    """Read once at start; times in seconds."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_MIGRATIONS_")

    connect_wait: float = Field(60.0, ge=0, description="how long a database that cannot be reached is waited for")
    lock_wait: float = Field(120.0, ge=0, description="how long another run of the migrations is waited for")
    lock_timeout: float = Field(
        2.0, gt=0, description="longest wait of a statement for a lock, so that it blocks nobody"
    )
    lock_tries: int = Field(10, ge=1, description="how often a revision is tried when a lock was not to be had")
    statement_timeout: float = Field(600.0, gt=0, description="longest time of one statement")


class UsersDatabase(Settings):
    """Where the users are."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_USERS_", extra="ignore")

    database_url: SecretStr = Field(description="libpq URL of the users database")


class NotificationsDatabase(Settings):
    """Where the notifications are."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_NOTIFICATIONS_", extra="ignore")

    database_url: SecretStr = Field(description="libpq URL of the notifications database")


_DATABASES: dict[str, type[UsersDatabase | NotificationsDatabase]] = {
    "users": UsersDatabase,
    "notifications": NotificationsDatabase,
}


def database_url(name: str) -> str:
    """The URL of a database. Raises InvalidSettingsError naming the variable if it is not set."""
    variable = f"TIDINGS_{name.upper()}_DATABASE_URL"
    try:
        return _DATABASES[name]().database_url.get_secret_value()  # type: ignore[call-arg]
    except ValidationError:
        raise InvalidSettingsError(f"{variable}: Field required" if variable not in os.environ else variable) from None
