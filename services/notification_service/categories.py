"""Categories: what users may decide about each kind of notification.

A file has `[[categories]]` tables; `default_categories.toml` is the one that is used unless the operator names another,
and explains every key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from notification_service.rules import ChannelName, Digest
from servicekit import configfile

DEFAULT_FILE = Path(__file__).with_name("default_categories.toml")

# The entry for categories that have none.
OTHERS = "*"

_Name = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,62}|\*)$")]


class Category(configfile.Entry):
    """One category; the fields are the keys of its table."""

    name: _Name
    mandatory: bool = False
    quiet_hours: bool = True
    off: frozenset[ChannelName] = frozenset()

    @model_validator(mode="after")
    def _mandatory_is_on(self) -> Self:
        if self.mandatory and self.off:
            raise ValueError("a mandatory category is on: off must be empty")
        return self

    @property
    def waits(self) -> bool:
        """Whether quiet hours defer it."""
        return self.quiet_hours and not self.mandatory


@dataclass(frozen=True, slots=True)
class Categories:
    """All categories of a file, by name, and what applies to any other."""

    named: Mapping[str, Category]
    others: Category

    def of(self, name: str) -> Category:
        """The category of this name; one with the file's defaults if it has no entry."""
        return self.named.get(name) or self.others


def load(path: Path | None) -> Categories:
    """The categories of a file, or the default ones; InvalidConfigError if it cannot be used."""
    named = {entry.name: entry for entry in configfile.read(path or DEFAULT_FILE, "categories", Category)}
    others = named.pop(OTHERS, None) or Category(name=OTHERS)
    return Categories(named, others)


def check_digests(categories: Categories, digests: Iterable[Digest]) -> None:
    """Raises InvalidConfigError if mails of a mandatory category, which cannot wait, are to be gathered."""
    problems = [
        f"digest {one.name!r}: category {one.category!r} is mandatory, and what is mandatory is not gathered"
        for one in digests
        if categories.of(one.category).mandatory
    ]
    if problems:
        raise configfile.InvalidConfigError("\n".join(problems))
