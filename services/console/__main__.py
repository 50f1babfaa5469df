"""`python -m console serve`"""

from __future__ import annotations

import uvloop

from console import bootstrap
from console.settings import ConsoleSettings
from servicekit import configfile, logs, settings
from servicekit.settings import LogSettings


def main() -> int:
    """Reads settings and files, and serves. Exit codes: 0 stopped, 1 failed, 2 wrong settings, files or arguments."""
    parser = settings.parser("python -m console", "The operators' page of Tidings.", ConsoleSettings, LogSettings)
    parser.add_argument("command", choices=["serve"], help="serve the page until SIGTERM")
    parser.parse_args()
    logs.configure(settings.load_or_exit(LogSettings), bootstrap.NAME)
    loaded = settings.load_or_exit(ConsoleSettings)
    with configfile.or_exit():
        return uvloop.run(bootstrap.serve(loaded))


if __name__ == "__main__":
    raise SystemExit(main())
