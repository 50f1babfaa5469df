"""Reads mail as the local system's mail catcher stores it.

The directory holds a file `<8-digit number>.eml` per message: lines X-Envelope-From and X-Envelope-To in UTF-8, then
the message as it was sent. A list of thousands must be quick: `read_head` looks at no body, and only headers that are
encoded take the long way through the parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage, Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any, BinaryIO

from tidings.cli.exits import CommandError, ExitCode

_NAME = re.compile(r"([0-9]{8})\.eml")
_SENDER, _RECIPIENT = "X-Envelope-From", "X-Envelope-To"
_HEADERS = BytesHeaderParser(policy=policy.compat32)

# All of ASCII that can be shown, and no encoded word.
_PLAIN = re.compile(r"(?:(?!=\?)[\x20-\x7e])*")


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of a stored message without its body."""

    number: int
    path: Path
    sender: str
    recipients: tuple[str, ...]
    # Bytes before the message as it was sent.
    envelope_size: int
    headers: Message[str, str]

    def header(self, name: str) -> str:
        """A header on one line; empty if it is not there."""
        for given, value in self.headers.raw_items():
            if given.lower() == name.lower():
                text = " ".join(value.split())
                if _PLAIN.fullmatch(text):
                    return text
                return " ".join(str(policy.default.header_fetch_parse(given, value)).split())
        return ""

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


def paths(directory: Path) -> Iterator[Path]:
    """The files of all messages, newest first."""
    if not directory.is_dir():
        message = f"no directory {directory}: start the local system with `make run`, or set --dir"
        raise CommandError(message, ExitCode.NOT_FOUND)
    yield from sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def read_head(path: Path) -> Head:
    """The envelope and the headers."""
    with path.open("rb") as file:
        return _head(path, file)


def read(path: Path) -> tuple[Head, EmailMessage]:
    """The envelope and headers, and the whole message."""
    with path.open("rb") as file:
        head = _head(path, file)
        file.seek(head.envelope_size)
        return head, message_from_bytes(file.read(), policy=policy.default)


def body(message: EmailMessage, kind: str) -> str:
    """The text ("plain") or HTML ("html") part; empty if it is not there."""
    part = message.get_body((kind,))
    return str(part.get_content()) if part else ""


def _head(path: Path, file: BinaryIO) -> Head:
    envelope: dict[str, list[str]] = {_SENDER: [], _RECIPIENT: []}
    lines: list[bytes] = []
    envelope_size = 0
    for line in file:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        if not lines and name in envelope:
            envelope[name].append(value.strip())
            envelope_size += len(line)
            continue
        lines.append(line)
        if not line.strip(b"\r\n"):
            break
    headers = _HEADERS.parsebytes(b"".join(lines))
    return Head(
        number=int(path.stem),
        path=path,
        sender="".join(envelope[_SENDER]),
        recipients=tuple(envelope[_RECIPIENT]),
        envelope_size=envelope_size,
        headers=headers,
    )
