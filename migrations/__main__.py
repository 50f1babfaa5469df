"""`python -m migrations upgrade all`"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from migrations import metrics, runner, waiting
from migrations.runner import MigrationError, Target
from migrations.settings import MigrationSettings, NotificationsDatabase, UsersDatabase, database_url
from servicekit import logs, settings
from servicekit.settings import InvalidSettingsError, LogSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, drifted or not in time, 2 wrong settings or arguments."""
    parser = settings.parser(
        "python -m migrations",
        "Brings the databases of Tidings to the schema of this release.",
        UsersDatabase,
        NotificationsDatabase,
        MigrationSettings,
        LogSettings,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("all", *runner.NAMES)
    for command, text, choices in (
        ("upgrade", "bring a database to the newest revision", names),
        ("downgrade", "take revisions back (development only: data is lost)", runner.NAMES),
        ("wait", "wait until the services of this release can use a database; a newer one will do", names),
        ("current", "print the revision of a database", names),
        ("check", "fail if a migrated database differs from the tables in the code", names),
        ("sql", "print the SQL of all revisions", names),
    ):
        sub = commands.add_parser(command, help=text, description=text)
        sub.add_argument("database", choices=choices)
        if command == "downgrade":
            sub.add_argument("revision", help="the revision to go back to, or base")
    asked = parser.parse_args(arguments)
    logs.configure(settings.load_or_exit(LogSettings), "tidings-migrations")
    configured = settings.load_or_exit(MigrationSettings)
    databases = runner.NAMES if asked.database == "all" else (asked.database,)
    if asked.command == "sql":
        for name in databases:
            print(runner.sql(name))
        return 0
    try:
        targets = [Target(name, database_url(name)) for name in databases]
    except InvalidSettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # As Ctrl-C: psycopg cancels what runs in the server, and its transaction is taken back. Process 1 of a container
    # would otherwise not be sent the signal at all.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(asked.command, targets, getattr(asked, "revision", ""), configured)
    except KeyboardInterrupt:
        print("error: stopped; what was under way is not applied: run it again", file=sys.stderr)
        return 1
    except MigrationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        metrics.push()


def _run(command: str, targets: Sequence[Target], revision: str, configured: MigrationSettings) -> int:
    code = 0
    for target in targets:
        if command == "upgrade":
            with metrics.upgrading(target.name):
                runner.upgrade(target, configured)
        elif command == "downgrade":
            runner.downgrade(target, revision, configured)
        elif command == "wait":
            waiting.wait(target, configured)
        elif command == "current":
            print(f"{target.name}: {runner.current(target, configured) or 'nothing'}")
        else:
            for difference in runner.check(target, configured):
                print(f"{target.name}: {difference}")
                code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
