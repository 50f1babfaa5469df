"""Array parameters for statements that write many rows at once, in Postgres' binary format.

psycopg's own list adaptation looks at every element in Python; for 100 users of 20 columns that cost more than
everything else in a group commit. Here a column is one join. An array is passed without a type: the statement casts it
(`%(ids)s::UUID[]`). Format: `array_recv` in Postgres' src/backend/utils/adt/arrayfuncs.c.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

_HEADER = struct.Struct("!iiIii")  # dimensions, has nulls, element type, length, lower bound
_NULL = struct.pack("!i", -1)
_SIZE = struct.Struct("!i")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

# Element types, by their oid in pg_type.
_BOOL, _BYTEA, _INT8, _INT2, _INT4, _TEXT, _TIMESTAMPTZ, _UUID = 16, 17, 20, 21, 23, 25, 1184, 2950


class Array:
    """An encoded array."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class ArrayDumper(Dumper):
    """Hands an Array to libpq as it is."""

    format = Format.BINARY
    oid = 0

    def dump(self, obj: Array) -> Buffer:
        """The encoded array."""
        return obj.data


def _join(kind: int, count: int, parts: Iterable[bytes], has_nulls: bool = False) -> Array:
    if not count:
        return Array(_HEADER.pack(0, 0, kind, 0, 1)[:12])
    return Array(_HEADER.pack(1, has_nulls, kind, count, 1) + b"".join(parts))


def _fixed(kind: int, code: str, values: Sequence[int]) -> Array:
    size = struct.calcsize(f"!{code}")
    flat = [part for value in values for part in (size, value)]
    return _join(kind, len(values), [struct.pack("!" + f"i{code}" * len(values), *flat)])


def texts(values: Sequence[str]) -> Array:
    """A text[]."""
    return byteas([value.encode() for value in values], _TEXT)


def nullable_texts(values: Sequence[str | None]) -> Array:
    """A text[] that may have nulls."""
    return byteas([None if value is None else value.encode() for value in values], _TEXT)


def nullable_uuids(values: Sequence[uuid.UUID | None]) -> Array:
    """A uuid[] that may have nulls."""
    return byteas([None if value is None else value.bytes for value in values], _UUID)


def byteas(values: Sequence[bytes | None], kind: int = _BYTEA) -> Array:
    """A bytea[]."""
    pack = _SIZE.pack
    parts = [_NULL if value is None else pack(len(value)) + value for value in values]
    return _join(kind, len(values), parts, None in values)


def _uniform(kind: int, values: Sequence[bytes]) -> Array:
    """Elements of one size."""
    if not values:
        return _join(kind, 0, ())
    size = _SIZE.pack(len(values[0]))
    return _join(kind, len(values), (size, size.join(values)))


def uuids(values: Sequence[uuid.UUID]) -> Array:
    """A uuid[]."""
    return _uniform(_UUID, [value.bytes for value in values])


def ids(values: Sequence[bytes]) -> Array:
    """A uuid[], of the 16 bytes of each."""
    return _uniform(_UUID, values)


def booleans(values: Sequence[bool]) -> Array:
    """A boolean[]."""
    return _fixed(_BOOL, "?", values)


def smallints(values: Sequence[int]) -> Array:
    """A smallint[]."""
    return _fixed(_INT2, "h", values)


def integers(values: Sequence[int]) -> Array:
    """An integer[]."""
    return _fixed(_INT4, "i", values)


def bigints(values: Sequence[int]) -> Array:
    """A bigint[]."""
    return _fixed(_INT8, "q", values)


def times(values: Sequence[datetime | None]) -> Array:
    """A timestamptz[]; microseconds since 2000."""
    return byteas([None if value is None else _time(value) for value in values], _TIMESTAMPTZ)


def _time(value: datetime) -> bytes:
    since = value - _EPOCH
    return struct.pack("!q", (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)
