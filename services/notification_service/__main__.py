"""`python -m notification_service serve`"""

from __future__ import annotations

import uvloop

from notification_service import bootstrap
from notification_service.settings import NotificationServiceSettings
from servicekit import configfile, logs, settings
from servicekit.settings import LogSettings


def main() -> int:
    """Reads settings and files, and serves. Exit codes: 0 stopped, 1 failed, 2 wrong settings, files or arguments."""
    parser = settings.parser(
        "python -m notification_service",
        "The notification service of Tidings.",
        NotificationServiceSettings,
        LogSettings,
    )
    parser.add_argument("command", choices=["serve"], help="serve gRPC until SIGTERM")
    parser.parse_args()
    logs.configure(settings.load_or_exit(LogSettings), bootstrap.NAME)
    loaded = settings.load_or_exit(NotificationServiceSettings)
    with configfile.or_exit():
        return uvloop.run(bootstrap.serve(loaded, bootstrap.composer(loaded)))


if __name__ == "__main__":
    raise SystemExit(main())
