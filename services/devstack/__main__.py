"""`python -m devstack run | mail-catcher | reload MODULE ARGUMENT... | copy-sources FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from devstack.settings import DevstackSettings, MailCatcherSettings
from servicekit import logs
from servicekit.settings import LogSettings, load_or_exit, parser


def main() -> int:
    """Reads the settings and runs one command. Returns the exit code: 0 stopped, 1 a part failed, 2 wrong settings."""
    arguments = parser("python -m devstack", __doc__ or "", DevstackSettings, LogSettings)
    commands = arguments.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="the whole system in the foreground")
    commands.add_parser("mail-catcher", help="only the SMTP server that keeps every message")
    reload = commands.add_parser("reload", help="a module, run again whenever a source changes")
    reload.add_argument("arguments", nargs=argparse.REMAINDER, metavar="MODULE ARGUMENT...")
    copy_sources = commands.add_parser("copy-sources", help="copy the sources to where they may be changed")
    copy_sources.add_argument("folder", type=Path)
    asked = arguments.parse_args()
    match asked.command:
        case "run":
            settings = load_or_exit(DevstackSettings)
            from devstack.console import Console
            from devstack.system import run

            return run(settings, Console())
        case "mail-catcher":
            catcher = load_or_exit(MailCatcherSettings)
            from devstack.mailcatcher import main as catch_mail

            logs.configure(load_or_exit(LogSettings), "mail-catcher")
            return catch_mail(catcher)
        case "reload":
            from devstack.reload import run as run_again

            if not asked.arguments:
                reload.error("which module?")
            logs.configure(load_or_exit(LogSettings), "reload")
            return run_again(asked.arguments)
        case _:
            from devstack import sources

            sources.copy(asked.folder)
            return 0


if __name__ == "__main__":
    sys.exit(main())
