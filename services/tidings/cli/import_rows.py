"""Reads users from CSV or JSON lines: each record is a user or a problem with its line, and reading goes on.

Line numbers are those of the file as an editor shows them; a record over several lines has the number of its first.
What is held in memory is bounded, whatever the file. Rules about values are the server's; here only that a record can
be read at all.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from tidings.cli.exits import CommandError, ExitCode
from tidings.users.v1 import users_pb2

LONGEST_LINE = 1 << 20

# A quote that is never closed is found after so many characters; no field of a user is as long.
_LONGEST_CSV_FIELD = 1 << 16

_TEXTS = ("username", "email", "display_name", "locale", "time_zone")
_LABEL_COLUMN = "labels."

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """A user as a record gives it."""

    line: int
    user: users_pb2.User


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a record does not become a user. `field` is empty if the whole record is wrong."""

    line: int
    field: str
    reason: str
    message: str


Record = Row | Problem


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    data: bytes
    # Else it is longer than LONGEST_LINE, and data is its beginning.
    whole: bool


class Lines:
    """The lines of a file. `read` is how many bytes have been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._number = 0
        self.read = 0

    def __iter__(self) -> Iterator[_Line]:
        return self

    def __next__(self) -> _Line:
        data = self._next_part()
        if not data:
            raise StopIteration
        self._number += 1
        if self._number == 1:
            data = data.removeprefix(_BOM)
        whole = True
        part = data
        while len(part) >= LONGEST_LINE and not part.endswith(b"\n"):
            part = self._next_part()
            whole = whole and not part
        return _Line(self._number, data, whole)

    def _next_part(self) -> bytes:
        part = self._file.readline(LONGEST_LINE)
        self.read += len(part)
        return part


def _too_long(line: int) -> Problem:
    return Problem(line, "", "LINE_TOO_LONG", f"is longer than {LONGEST_LINE} bytes")


def _set_text(user: users_pb2.User, field: str, value: str) -> None:
    setattr(user, field, value)


def _set_label(user: users_pb2.User, key: str, value: str) -> None:
    user.labels[key] = value


# CSV


class _CsvLines:
    """Feeds a csv.reader, remembers what its record took, and can take all but the first line of that back."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._again: deque[_Line] = deque()
        self.taken: list[_Line] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        # Bytes that are not UTF-8 become lone surrogates, so that the record they are in can still be told.
        return line.data.decode("utf-8", "surrogateescape")

    def take_back(self) -> None:
        self._again.extendleft(reversed(self.taken[1:]))


@dataclass(frozen=True, slots=True)
class _Column:
    path: str
    key: str
    set: Callable[[users_pb2.User, str, str], None]


def read_csv(lines: Iterator[_Line]) -> Iterator[Record]:
    """The records of a CSV file with a header. Raises CommandError if the header is not one."""
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    source = _CsvLines(lines)
    reader = csv.reader(source, strict=True)
    try:
        header = next(reader)
    except (StopIteration, csv.Error) as error:
        raise _header_error(str(error) or "the file is empty") from None
    columns = _columns(header)
    while True:
        source.taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Most likely a stray quote, which has swallowed good lines.
            source.take_back()
            yield Problem(source.taken[0].number, "", "BAD_CSV", f"is not CSV: {error}")
            continue
        if not all(line.whole for line in source.taken):
            yield _too_long(source.taken[0].number)
        elif cells:
            yield _csv_record(source.taken[0].number, columns, cells)


def _header_error(message: str) -> CommandError:
    return CommandError(f"line 1: {message}", ExitCode.USAGE)


def _columns(header: Sequence[str]) -> list[_Column]:
    columns = []
    for given in header:
        name = given.strip()
        if name in _TEXTS:
            columns.append(_Column(f"user.{name}", name, _set_text))
        elif name.startswith(_LABEL_COLUMN) and name != _LABEL_COLUMN:
            columns.append(_Column(f"user.{name}", name.removeprefix(_LABEL_COLUMN), _set_label))
        else:
            known = ", ".join((*_TEXTS, f"{_LABEL_COLUMN}KEY"))
            raise _header_error(f"{given!r} is not a column: the header names some of {known}")
    names = [column.path for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise _header_error(f"the column {name.removeprefix('user.')} is there twice")
    for field in ("username", "email"):
        if f"user.{field}" not in names:
            raise _header_error(f"the column {field} is missing")
    return columns


def _csv_record(line: int, columns: Sequence[_Column], cells: Sequence[str]) -> Record:
    if len(cells) != len(columns):
        message = f"has {len(cells)} columns, the header has {len(columns)}"
        return Problem(line, "", "WRONG_COLUMN_COUNT", message)
    user = users_pb2.User()
    for column, value in zip(columns, cells, strict=True):
        if not value:
            continue
        if not _is_unicode(value):
            return Problem(line, column.path, "BAD_UTF8", "is not UTF-8")
        column.set(user, column.key, value)
    return Row(line, user)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# JSON lines

# Both names that proto3 JSON knows for a field; what the server assigns is accepted and left out.
_JSON_NAMES = {name: field.name for field in users_pb2.User.DESCRIPTOR.fields for name in (field.name, field.json_name)}


def read_json_lines(lines: Iterator[_Line]) -> Iterator[Record]:
    """The records of a file with one JSON object per line."""
    for line in lines:
        if not line.whole:
            yield _too_long(line.number)
            continue
        try:
            text = line.data.decode()
        except UnicodeDecodeError as error:
            yield Problem(line.number, "", "BAD_UTF8", f"is not UTF-8 at byte {error.start + 1}")
            continue
        if not text.strip():
            continue
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Problem(line.number, "", "BAD_JSON", f"is not JSON: {error}")
            continue
        if isinstance(data, dict):
            yield _json_record(line.number, data)
        else:
            yield Problem(line.number, "", "BAD_JSON", "is not a JSON object")


def _json_record(line: int, data: Mapping[str, Any]) -> Record:
    user = users_pb2.User()
    for name, value in data.items():
        field = _JSON_NAMES.get(name)
        if field is None:
            return Problem(line, f"user.{name}", "UNKNOWN_FIELD", "is not a field of a user")
        if value is None:
            continue
        problem = None
        if field == "labels":
            problem = _set_labels(line, user, value)
        elif field in _TEXTS:
            problem = _text_problem(line, f"user.{field}", value)
            if problem is None:
                setattr(user, field, value)
        if problem is not None:
            return problem
    return Row(line, user)


def _set_labels(line: int, user: users_pb2.User, labels: Any) -> Problem | None:
    if not isinstance(labels, dict):
        return Problem(line, "user.labels", "WRONG_TYPE", "must be an object of strings")
    for key, value in labels.items():
        problem = _text_problem(line, "user.labels", key) or _text_problem(line, f"user.labels.{key}", value)
        if problem is not None:
            return problem
        user.labels[key] = value
    return None


def _text_problem(line: int, path: str, value: Any) -> Problem | None:
    if not isinstance(value, str):
        return Problem(line, path, "WRONG_TYPE", "must be a string")
    if not _is_unicode(value):
        return Problem(line, path, "BAD_UTF8", "holds half a character")
    return None
