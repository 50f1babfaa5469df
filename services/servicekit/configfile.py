"""TOML files of the operator: refused with lines that name the file, the entry and the problem."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


class Entry(BaseModel):
    """One table of a list in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    name: str


class InvalidConfigError(Exception):
    """A file cannot be used; the message has one line per problem."""


def one_of(names: Collection[str]) -> AfterValidator:
    """For the annotation of a text that must be one of `names`."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name!r} is none of {', '.join(names)}")
        return name

    return AfterValidator(check)


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def read(path: Path, key: str, kind: type[AnyEntry], *, beside: Collection[str] = ()) -> tuple[AnyEntry, ...]:
    """The entries of `[[key]]` of a file, each with a name of its own. The file may have the lists `beside`, too."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidConfigError(f"{path}: {error}") from None
    return parse(path, content, key, kind, beside=beside)


def parse(
    path: Path,
    content: bytes,
    key: str,
    kind: type[AnyEntry],
    *,
    distinct: bool = True,
    beside: Collection[str] = (),
) -> tuple[AnyEntry, ...]:
    """The entries of `[[key]]` in what a file holds; unless `distinct` is off each with a name of its own. The file may
    have the lists `beside`, too.
    """
    try:
        document = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfigError(f"{path}: {error}") from None
    unknown = sorted(set(document) - {key, *beside})
    tables = document.get(key, [])
    if unknown or not isinstance(tables, list):
        known = " and ".join(f"[[{name}]]" for name in (key, *beside))
        raise InvalidConfigError(f"{path}: has {known} tables and nothing else, but found: {', '.join(unknown) or key}")
    entries: list[AnyEntry] = []
    problems: list[str] = []
    for number, table in enumerate(tables, 1):
        label = _label(key, number, table)
        try:
            entry = kind.model_validate(table)
        except ValidationError as error:
            problems += [f"{path}: {label}: {_where(detail['loc'])}{detail['msg']}" for detail in error.errors()]
            continue
        if distinct and any(entry.name == other.name for other in entries):
            problems.append(f"{path}: {label}: another one has this name")
        entries.append(entry)
    if problems:
        raise InvalidConfigError("\n".join(problems))
    return tuple(entries)


@contextmanager
def or_exit() -> Iterator[None]:
    """Ends the process with code 2 and the reasons on standard error if a file cannot be used."""
    try:
        yield
    except InvalidConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def _label(key: str, number: int, table: Any) -> str:
    singular = key.removesuffix("s")
    name = table.get("name") if isinstance(table, dict) else None
    return f"{singular} {name!r}" if isinstance(name, str) else f"{singular} number {number}"


def _where(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) + ": " if loc else ""
