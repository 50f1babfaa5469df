"""`python -m notification_service serve|reset-cursor`"""

from __future__ import annotations

import uvloop

from notification_service import bootstrap, reset
from notification_service.settings import NotificationServiceSettings
from servicekit import configfile, logs, settings
from servicekit.settings import LogSettings

_RESET = """
Sets the place in the user feed from which this service goes on, for when the feed refuses the one it has. Says what
that means and asks; the service may run meanwhile and goes on from there by itself. What is processed again is not
told again: its notifications are known by their ids. What is passed over makes no notifications.
"""


def main() -> int:
    """Reads settings and files, and serves. Exit codes: 0 stopped or done, 1 failed, 2 wrong settings, files or
    arguments.
    """
    parser = settings.parser(
        "python -m notification_service",
        "The notification service of Tidings.",
        NotificationServiceSettings,
        LogSettings,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve gRPC until SIGTERM")
    resetting = commands.add_parser("reset-cursor", help="go on elsewhere in the user feed", description=_RESET)
    resetting.add_argument(
        "--to",
        required=True,
        type=reset.start,
        metavar="earliest|now|TIME",
        help="the first change that is retained, only what comes from now on, or changes since a time such as "
        "2026-01-31T12:00:00Z",
    )
    resetting.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args()
    logs.configure(settings.load_or_exit(LogSettings), bootstrap.NAME)
    loaded = settings.load_or_exit(NotificationServiceSettings)
    with configfile.or_exit():
        if arguments.command == "reset-cursor":
            confirm = (lambda text: print(text) is None) if arguments.yes else reset.asked
            return uvloop.run(bootstrap.reset_cursor(loaded, arguments.to, confirm))
        return uvloop.run(bootstrap.serve(loaded, bootstrap.read(loaded)))


if __name__ == "__main__":
    raise SystemExit(main())
