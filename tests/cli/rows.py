"""Reads bytes as an import reads a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from tidings.cli.import_rows import Lines, Problem, Record, Row

Reader = Callable[[Lines], Iterator[Record]]


def read(reader: Reader, data: bytes) -> list[Record]:
    """All records."""
    return list(reader(Lines(io.BytesIO(data))))


def users(reader: Reader, data: bytes) -> list[Row]:
    """All records of a file without problems."""
    rows = [record for record in read(reader, data) if isinstance(record, Row)]
    assert not problems(reader, data)
    return rows


def problems(reader: Reader, data: bytes) -> list[Problem]:
    """The problems of a file."""
    return [record for record in read(reader, data) if isinstance(record, Problem)]
