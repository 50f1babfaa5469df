"""Fault switches: ways to break a service, each by replacing one thing of it when its process starts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Switch:
    """A way to break a service, and the promise that it breaks."""

    name: str
    promise: str
    what: str
    apply: Callable[[], None]


def switch(switches: dict[str, Switch], promise: str, what: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Adds what it decorates to the switches, by its name without underscores."""

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        name = apply.__name__.strip("_")
        switches[name] = Switch(name, promise, what, apply)
        return apply

    return register


def put(owner: object, name: str, replacement: object) -> None:
    """Replaces something of a module or class."""
    assert hasattr(owner, name)
    setattr(owner, name, replacement)


def once_in(count: int) -> bool:
    """Whether to err this time."""
    return random.randrange(count) == 0
