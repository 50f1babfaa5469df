"""The terminal of `make run`: whole lines, each behind the name of the part that speaks, one colour per part.

Colours are used if standard output is a terminal or FORCE_COLOR is set, never if NO_COLOR is set. A reader that went
away (`make run | head`) silences the console and stops nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TextIO

SUPERVISOR = "devstack"
# Sixteen-colour codes, which every terminal theme keeps readable.
_COLOURS = {
    SUPERVISOR: "1;37",
    "postgres": "34",
    "migrations": "35",
    "user-service": "32",
    "notification-service": "36",
    "mail-catcher": "33",
    "console": "1;36",
}
_WIDTH = max(map(len, _COLOURS))
_LONGEST = 64 * 1024


def coloured(stream: TextIO) -> bool:
    """Whether to write colours to `stream`, as no-color.org and force-color.org have it."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


class Console:
    """Writes prefixed lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._coloured = coloured(self._stream)
        self._gone = False

    def line(self, part: str, text: str) -> None:
        """One line of a part."""
        prefix = f"{part:<{_WIDTH}} |"
        if self._coloured:
            prefix = f"\x1b[{_COLOURS.get(part, '37')}m{prefix}\x1b[0m"
        self._write(f"{prefix} {text}\n")

    def say(self, text: str) -> None:
        """A line of the supervisor itself."""
        self.line(SUPERVISOR, text)

    def block(self, lines: list[str]) -> None:
        """Lines without prefix, set off by blank lines."""
        self._write("\n" + "\n".join(lines) + "\n\n")

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._gone = True
            # The interpreter flushes standard output at its exit; that must not fail either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


async def pump(console: Console, part: str, stream: asyncio.StreamReader) -> None:
    """Copies a part's output line by line until its end; a line without end is cut into pieces."""
    rest = b""
    while chunk := await stream.read(_LONGEST):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LONGEST:
            lines.append(rest)
            rest = b""
        for line in lines:
            console.line(part, line.decode(errors="replace").rstrip("\r"))
    if rest:
        console.line(part, rest.decode(errors="replace"))
