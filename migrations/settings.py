"""Settings of the migrations: `TIDINGS_MIGRATIONS_*`, and the databases' URLs under the names that the services use."""

from __future__ import annotations

from typing import Annotated

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict

from servicekit.settings import InvalidSettingsError, Settings, variable


def _checked(url: SecretStr) -> SecretStr:
    """Refuses what libpq would refuse later, and what it would take for a database that nobody named."""
    text = url.get_secret_value()
    try:
        conninfo_to_dict(text)
    except psycopg.ProgrammingError:
        text = ""
    if not text.startswith(("postgresql://", "postgres://")):
        # libpq's own words quote the URL, and with it the password.
        raise ValueError("must be a URL as libpq has it: postgresql://user:password@host:port/database") from None
    return url


DatabaseUrl = Annotated[SecretStr, AfterValidator(_checked)]


class MigrationSettings(Settings):
    """Read once at start; times in seconds, no shorter than the millisecond that Postgres counts in."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_MIGRATIONS_")

    connect_wait: float = Field(60.0, ge=0, description="how long a database that cannot be reached is waited for")
    lock_wait: float = Field(120.0, ge=0, description="how long another run of the migrations is waited for")
    lock_timeout: float = Field(
        2.0, ge=0.001, description="longest wait of a statement for a lock, so that it blocks nobody"
    )
    lock_tries: int = Field(10, ge=1, description="how often a revision is tried when a lock was not to be had")
    statement_timeout: float = Field(600.0, ge=0.001, description="longest time of one statement")
    schema_wait: float = Field(600.0, ge=0, description="how long `wait` waits for a schema that a service can use")
    users_role: str = Field(
        "", description="role of the user service, given what it needs of a database that another owns; none if empty"
    )
    notifications_role: str = Field("", description="the same for the notification service")

    def role(self, name: str) -> str:
        """The role of the service of a database; empty if it owns the database."""
        return {"users": self.users_role, "notifications": self.notifications_role}[name]


class UsersDatabase(Settings):
    """Where the users are."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_USERS_", extra="ignore")

    database_url: DatabaseUrl = Field(description="libpq URL of the users database")


class NotificationsDatabase(Settings):
    """Where the notifications are."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_NOTIFICATIONS_", extra="ignore")

    database_url: DatabaseUrl = Field(description="libpq URL of the notifications database")


_DATABASES: dict[str, type[UsersDatabase | NotificationsDatabase]] = {
    "users": UsersDatabase,
    "notifications": NotificationsDatabase,
}


def database_url(name: str) -> str:
    """The URL of a database. Raises InvalidSettingsError naming the variable and what is wrong with it.

    `servicekit.settings.load` is not used: it would refuse the service's other settings, which stand beside this one.
    """
    kind = _DATABASES[name]
    try:
        return kind().database_url.get_secret_value()  # type: ignore[call-arg]
    except ValidationError as error:
        reasons = "; ".join(detail["msg"] for detail in error.errors())
        raise InvalidSettingsError(f"{variable(kind, 'database_url')}: {reasons}") from None
