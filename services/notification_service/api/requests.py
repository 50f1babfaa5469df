"""What the methods of every service check and answer alike: ids, pages, a database that is away."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from notification_service import errors, tokens
from servicekit import database, rpc
from servicekit.database import Connection, Pool
from servicekit.errors import Violation, invalid

_END = (1 << 63) - 1


class _Paged(Protocol):
    """A request for a page."""

    page_size: int
    page_token: str


@contextmanager
def reaching() -> Iterator[None]:
    """Around what asks the database for a call. Raises DATABASE_UNAVAILABLE."""
    try:
        yield
    except database.AWAY as error:
        raise errors.database_unavailable() from error


@asynccontextmanager
async def connection(pool: Pool) -> AsyncIterator[Connection]:
    """A connection for one call. Raises DATABASE_UNAVAILABLE."""
    with reaching():
        async with pool.connection() as opened:
            yield opened


def one_id(text: str, path: str = "id") -> uuid.UUID:
    """The id that a field must have. Raises INVALID_FIELD."""
    try:
        return uuid.UUID(text)
    except ValueError:
        raise invalid(Violation(path, "must be a UUID" if text else "is required")) from None


def each_id(texts: Iterable[str], path: str, violations: list[Violation]) -> list[uuid.UUID]:
    """The ids of a list; what is none is added to the violations."""
    found = []
    for index, text in enumerate(texts):
        try:
            found.append(uuid.UUID(text))
        except ValueError:
            violations.append(Violation(f"{path}[{index}]", "must be a UUID"))
    return found


def ids(**texts: str) -> dict[str, Any]:
    """The ids of a filter that are set."""
    found: dict[str, Any] = {}
    violations = []
    for name, text in texts.items():
        if not text:
            continue
        try:
            found[name] = uuid.UUID(text)
        except ValueError:
            violations.append(Violation(f"filter.{name}", "must be a UUID"))
    if violations:
        raise invalid(*violations)
    return found


def page(
    request: _Paged,
    filters: Mapping[str, Any],
) -> tuple[int, bytes, int]:
    """Size, selection and upper end of a page of a list that is ordered by position, newest first."""
    size = rpc.page_size(request.page_size)
    parts: Iterable[str] = (f"{name}={filters[name]}" for name in sorted(filters))
    selection = tokens.selection_hash(type(request).__name__, *parts)
    before = tokens.decode_page(request.page_token, selection) if request.page_token else _END
    return size, selection, before


def next_page(positions: Sequence[int], size: int, selection: bytes) -> str:
    """The token of the next page, empty if there is none; `positions` are those found, one more than `size` at most."""
    if len(positions) <= size:
        return ""
    return tokens.encode_page(positions[size - 1], selection)


def plain(given: Struct) -> dict[str, Any]:
    """The content of a Struct, its whole numbers as such: protobuf has them as floats."""
    content: dict[str, Any] = _whole(MessageToDict(given))
    return content


def _whole(value: Any) -> Any:
    """JSON without a decimal point where a number is whole: all numbers of a Struct are floats."""
    if isinstance(value, Mapping):
        return {key: _whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
