"""What commands print: tables and lines for people, JSON lines for programs.

Standard output carries data only. Text from outside is shown without control characters, so that no name or mail can
steer a terminal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import Any

from google.protobuf import timestamp_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Rich leaves colours out where there is no terminal, and where NO_COLOR is set.
_out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

_ENDLESS = 1_000_000

# Control characters, and those that change the direction of the text after them.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """The text as it may go to a terminal, on one line."""
    return _STEERING.sub(lambda match: repr(match[0])[1:-1], text)


def error(message: str) -> None:
    """One line on standard error."""
    label = Text("error: ", style="bold red")
    err.print(label.append(shown(message), style="not bold default"), soft_wrap=True)


def note(message: str) -> None:
    """A line for people on standard error."""
    err.print(shown(message), soft_wrap=True)


def json_line(data: Message | Mapping[str, Any]) -> str:
    """One line of JSON; messages as proto3 JSON has them, with the names of the .proto files."""
    if isinstance(data, Message):
        data = MessageToDict(data, preserving_proto_field_name=True)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def write(lines: Iterable[str]) -> None:
    """Prints lines at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, each row on one line: an id that is broken up cannot be copied."""
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    Console(width=_ENDLESS).print(made)


def record(fields: Iterable[tuple[str, str]]) -> None:
    """Prints one thing, a field a line; empty fields are left out."""
    given = [(name, value) for name, value in fields if value]
    width = max(len(name) for name, _ in given)
    for name, value in given:
        line = Text(f"{name:<{width}}  ", style="bold")
        _out.print(line.append(shown(value), style="not bold"), soft_wrap=True)


def heading(text: str) -> None:
    """A line that stands out, on standard output."""
    _out.print(Text(shown(text), style="bold"), soft_wrap=True)


def styled(label: str, style: str, text: str) -> None:
    """A line with a coloured label, on standard output."""
    _out.print(Text(label, style=style).append(f"  {shown(text)}", style="not bold default"), soft_wrap=True)


def time(stamp: timestamp_pb2.Timestamp) -> str:
    """A time in UTC to the second; empty if it is not set."""
    if not stamp.seconds:
        return ""
    return stamp.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%d %H:%M:%SZ")
