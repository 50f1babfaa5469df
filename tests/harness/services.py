"""Starts services for a test and stops them at its end, the last started first."""

from __future__ import annotations

from collections.abc import Mapping

from tests.harness.mail import MailCatcher
from tests.harness.postgres import Database
from tests.harness.process import ServiceProcess

USERS = "TIDINGS_USERS_"
NOTIFICATIONS = "TIDINGS_NOTIFICATIONS_"


def _environment(prefix: str, settings: Mapping[str, object]) -> dict[str, str]:
    return {f"{prefix}{name.upper()}": str(value) for name, value in settings.items()}


class Services:
    """Settings are given by their names in lower case: `linger=0` is `TIDINGS_USERS_LINGER=0`."""

    def __init__(self) -> None:
        self._started: list[ServiceProcess] = []
        # Variables of every process that is made from now on.
        self.environment: dict[str, str] = {}

    def process(
        self, module: str, *arguments: str, environment: Mapping[str, str], listen_variable: str | None = None
    ) -> ServiceProcess:
        """Any process, not started yet."""
        process = ServiceProcess(
            module, *arguments, environment=self.environment | dict(environment), listen_variable=listen_variable
        )
        self._started.append(process)
        return process

    def users(
        self, database: Database | str, command: tuple[str, ...] = ("user_service", "serve"), **settings: object
    ) -> ServiceProcess:
        """A user service, not started yet: `await services.users(database).start()`. `command` is its module and
        arguments.
        """
        url = database.url if isinstance(database, Database) else database
        environment = _environment(USERS, {"database_url": url, **settings})
        return self.process(*command, environment=environment, listen_variable=f"{USERS}LISTEN")

    def notifications(
        self,
        database: Database | str,
        users: ServiceProcess | str,
        mail: MailCatcher | None = None,
        command: tuple[str, ...] = ("notification_service", "serve"),
        **settings: object,
    ) -> ServiceProcess:
        """A notification service, not started yet. `command` is its module and arguments."""
        smtp = {"smtp_host": "127.0.0.1", "smtp_port": mail.port} if mail else {}
        address = users.address if isinstance(users, ServiceProcess) else users
        url = database.url if isinstance(database, Database) else database
        environment = _environment(NOTIFICATIONS, {"database_url": url, "users_address": address, **smtp, **settings})
        return self.process(*command, environment=environment, listen_variable=f"{NOTIFICATIONS}LISTEN")

    async def stop(self) -> None:
        """Ends every process."""
        for process in reversed(self._started):
            if process.alive:
                await process.stop()
        self._started.clear()
