"""`python -m devstack run | mail-catcher`."""

from __future__ import annotations

import sys

from devstack.settings import DevstackSettings, MailCatcherSettings
from servicekit.settings import LogSettings, load_or_exit, parser


def main() -> int:
    """Reads the settings and runs one command. Returns the exit code: 0 stopped, 1 a part failed, 2 wrong settings."""
    arguments = parser("python -m devstack", __doc__ or "", DevstackSettings, LogSettings)
    arguments.add_argument(
        "command",
        choices=("run", "mail-catcher"),
        help="run: the whole system in the foreground; mail-catcher: only the SMTP server that keeps every message",
    )
    command = arguments.parse_args().command
    if command == "run":
        settings = load_or_exit(DevstackSettings)
        from devstack.console import Console
        from devstack.system import run

        return run(settings, Console())
    catcher = load_or_exit(MailCatcherSettings)
    from devstack.mailcatcher import main as catch_mail
    from servicekit import logs

    logs.configure(load_or_exit(LogSettings), "mail-catcher")
    return catch_mail(catcher)


if __name__ == "__main__":
    sys.exit(main())
