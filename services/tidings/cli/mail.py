"""`tidings mail list|show`: what the local system's mail catcher has stored.

The directory holds a file `<8-digit number>.eml` per message: lines X-Envelope-From and X-Envelope-To in UTF-8, then
the message as it was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Annotated, Any

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, reported
from tidings.cli.options import DEFAULT_LIMIT, All, Json, Limit, examples

app = typer.Typer(
    help="Mail that the local system has caught.",
    epilog=examples("tidings mail list", "tidings mail show latest"),
    no_args_is_help=True,
)

_MAIL_DIR = Path(".tidings/mail")
_NAME = re.compile(r"([0-9]{8})\.eml")
_ENVELOPE = {"X-Envelope-From": "sender", "X-Envelope-To": "recipients"}
_LATEST = "latest"

MailDir = Annotated[
    Path, typer.Option("--dir", envvar="TIDINGS_CLIENT_MAIL_DIR", file_okay=False, help="Where the mail is stored.")
]


@dataclass(frozen=True, slots=True)
class _Mail:
    """One stored message."""

    number: int
    path: Path
    sender: str
    recipients: tuple[str, ...]
    message: EmailMessage

    def header(self, name: str) -> str:
        """A header on one line; empty if it is not there."""
        return " ".join(str(self.message[name] or "").split())

    def body(self, kind: str) -> str:
        """The text or HTML part; empty if it is not there."""
        part = self.message.get_body((kind,))
        return str(part.get_content()) if part else ""

    def summary(self) -> dict[str, Any]:
        """What a list shows of it."""
        return {
            "number": self.number,
            "file": str(self.path),
            "envelope_from": self.sender,
            "envelope_to": list(self.recipients),
            "from": self.header("From"),
            "to": self.header("To"),
            "subject": self.header("Subject"),
            "date": self.header("Date"),
            "message_id": self.header("Message-ID"),
        }


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
        for path in _paths(directory):
            mail = _read(path)
            if to and to.casefold() not in (recipient.casefold() for recipient in mail.recipients):
                continue
            if count == limit and not everything:
                more = True
                break
            count += 1
            if as_json:
                output.write([output.json_line(mail.summary())])
            else:
                cells = (str(mail.number), mail.header("Date"), ", ".join(mail.recipients), mail.header("Subject"))
                rows.append(list(cells))
        if not as_json:
            output.table(("NUMBER", "DATE", "TO", "SUBJECT"), rows)
        if more:
            output.note(f"{count} shown; there are more: --limit N or --all")


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
        mail = _read(path)
        if as_json:
            headers = [[name, str(value)] for name, value in mail.message.items()]
            output.write(
                [
                    output.json_line(
                        {**mail.summary(), "headers": headers, "text": mail.body("plain"), "html": mail.body("html")}
                    )
                ]
            )
            return
        output.record(
            [
                ("From", mail.header("From")),
                ("To", mail.header("To")),
                ("Delivered to", ", ".join(mail.recipients)),
                ("Subject", mail.header("Subject")),
                ("Date", mail.header("Date")),
                ("Message-ID", mail.header("Message-ID")),
            ]
        )
        output.write(["", *(output.shown(line) for line in mail.body("html" if html else "plain").splitlines())])


def _paths(directory: Path) -> Iterator[Path]:
    if not directory.is_dir():
        message = f"no directory {directory}: start the local system with `make run`, or set --dir"
        raise CommandError(message, ExitCode.NOT_FOUND)
    yield from sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _path(directory: Path, number: str) -> Path:
    if number == _LATEST:
        path = next(_paths(directory), None)
        if path is None:
            raise CommandError(f"no mail in {directory}", ExitCode.NOT_FOUND)
        return path
    if not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is neither a number nor {_LATEST}", param_hint="NUMBER")
    path = directory / f"{int(number):08d}.eml"
    if not path.is_file():
        raise CommandError(f"no mail {number} in {directory}", ExitCode.NOT_FOUND)
    return path


def _read(path: Path) -> _Mail:
    content = path.read_bytes()
    envelope: dict[str, list[str]] = {"sender": [], "recipients": []}
    while True:
        line, _, rest = content.partition(b"\n")
        name, _, value = line.decode("utf-8", "replace").partition(":")
        if name not in _ENVELOPE:
            break
        envelope[_ENVELOPE[name]].append(value.strip())
        content = rest
    return _Mail(
        number=int(path.stem),
        path=path,
        sender="".join(envelope["sender"]),
        recipients=tuple(envelope["recipients"]),
        message=message_from_bytes(content, policy=policy.default),
    )
