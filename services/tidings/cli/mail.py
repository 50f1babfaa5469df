"""`tidings mail list|show`: what the local system's mail catcher has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidings.cli import mail_files, output
from tidings.cli.exits import CommandError, ExitCode, reported
from tidings.cli.options import DEFAULT_LIMIT, All, Json, Limit, examples

app = typer.Typer(
    help="Mail that the local system has caught.",
    epilog=examples("tidings mail list", "tidings mail show latest"),
    no_args_is_help=True,
)

_MAIL_DIR = Path(".tidings/mail")
_LATEST = "latest"

_COLUMNS = ("NUMBER", "DATE", "FROM", "TO", "SUBJECT", "MESSAGE-ID")

MailDir = Annotated[
    Path, typer.Option("--dir", envvar="TIDINGS_CLIENT_MAIL_DIR", file_okay=False, help="Where the mail is stored.")
]

_LIST_EXAMPLES = examples("tidings mail list --limit 10", "tidings mail list --to ada@example.com --json")


@app.command("list", epilog=_LIST_EXAMPLES)
def list_mail(
    to: Annotated[str, typer.Option("--to", metavar="ADDRESS", help="Only mail to this address.")] = "",
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    directory: MailDir = _MAIL_DIR,
    as_json: Json = False,
) -> None:
    """List mail, newest first."""
    with reported():
        rows: list[list[str]] = []
        count = 0
        more = False
        for path in mail_files.paths(directory):
            head = mail_files.read_head(path)
            if to and to.casefold() not in (recipient.casefold() for recipient in head.recipients):
                continue
            if count == limit and not everything:
                more = True
                break
            count += 1
            if as_json:
                output.write([output.json_line(head.summary())])
            else:
                rows.append(_row(head))
        if not as_json:
            output.table(_COLUMNS, rows)
        if more:
            output.note(f"{count} shown; there are more: --limit N or --all")


def _row(head: mail_files.Head) -> list[str]:
    return [
        str(head.number),
        head.header("Date"),
        head.header("From"),
        ", ".join(head.recipients),
        head.header("Subject"),
        head.header("Message-ID"),
    ]


_SHOW_EXAMPLES = examples("tidings mail show latest", "tidings mail show 17 --html", "tidings mail show 17 --raw")


@app.command(epilog=_SHOW_EXAMPLES)
def show(
    number: Annotated[str, typer.Argument(metavar="NUMBER|latest", help="As `mail list` shows it.")],
    html: Annotated[bool, typer.Option("--html", help="The HTML part instead of the text.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The file as it is stored.")] = False,
    directory: MailDir = _MAIL_DIR,
    as_json: Json = False,
) -> None:
    """Show one mail."""
    with reported():
        path = _path(directory, number)
        if raw:
            typer.echo(path.read_bytes(), nl=False)
            return
        head, message = mail_files.read(path)
        if as_json:
            headers = [[name, str(value)] for name, value in message.items()]
            bodies = {"text": mail_files.body(message, "plain"), "html": mail_files.body(message, "html")}
            output.write([output.json_line({**head.summary(), "headers": headers, **bodies})])
            return
        output.record(
            [
                ("From", head.header("From")),
                ("To", head.header("To")),
                ("Delivered to", ", ".join(head.recipients)),
                ("Subject", head.header("Subject")),
                ("Date", head.header("Date")),
                ("Message-ID", head.header("Message-ID")),
                ("Unsubscribe", head.header("List-Unsubscribe").strip("<>")),
            ]
        )
        text = mail_files.body(message, "html" if html else "plain")
        output.write(["", *(output.shown(line) for line in text.splitlines())])


def _path(directory: Path, number: str) -> Path:
    if number == _LATEST:
        path = next(mail_files.paths(directory), None)
        if path is None:
            raise CommandError(f"no mail in {directory}", ExitCode.NOT_FOUND)
        return path
    if not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is neither a number nor {_LATEST}", param_hint="NUMBER")
    path = directory / f"{int(number):08d}.eml"
    if not path.is_file():
        raise CommandError(f"no mail {number} in {directory}", ExitCode.NOT_FOUND)
    return path
