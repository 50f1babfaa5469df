"""Prints a list that comes page by page: JSON lines as they come, or one table and how to see more."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from google.protobuf.message import Message

from tidings.cli import output

Item = TypeVar("Item", bound=Message)

_LARGEST_PAGE = 1000


def page_size(limit: int, everything: bool) -> int:
    """How many to ask for at a time; one more than the limit tells whether there are more."""
    return _LARGEST_PAGE if everything else min(limit + 1, _LARGEST_PAGE)


async def show(
    items: AsyncGenerator[Item, None],
    columns: Sequence[str],
    row: Callable[[Item], Sequence[str]],
    *,
    limit: int,
    everything: bool,
    as_json: bool,
) -> None:
    """Prints the first `limit` items, or everything."""
    rows: list[Sequence[str]] = []
    count = 0
    more = False
    async with aclosing(items):
        async for item in items:
            if count == limit and not everything:
                more = True
                break
            count += 1
            if as_json:
                output.write([output.json_line(item)])
            else:
                rows.append(row(item))
    if not as_json:
        output.table(columns, rows)
    if more:
        output.note(f"{count} shown; there are more: --limit N or --all")
