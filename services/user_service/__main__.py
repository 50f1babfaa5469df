"""`python -m user_service serve`"""

from __future__ import annotations

import uvloop

from servicekit import configfile, logs, settings
from servicekit.settings import LogSettings
from user_service import bootstrap
from user_service.settings import UserServiceSettings


def main() -> int:
    """Reads the settings and serves. Exit codes: 0 stopped, 1 failed, 2 wrong settings, files or arguments."""
    parser = settings.parser("python -m user_service", "The user service of Tidings.", UserServiceSettings, LogSettings)
    parser.add_argument("command", choices=["serve"], help="serve gRPC until SIGTERM")
    parser.parse_args()
    logs.configure(settings.load_or_exit(LogSettings), bootstrap.NAME)
    loaded = settings.load_or_exit(UserServiceSettings)
    with configfile.or_exit():
        return uvloop.run(bootstrap.serve(loaded))


if __name__ == "__main__":
    raise SystemExit(main())
