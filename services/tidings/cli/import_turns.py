"""Lines that may want the same username or email are sent one after another, in the order of the file.

What always holds: of two such lines the first has its answer before the second is sent, so that the first one wins,
in every run. Lines wait only for earlier ones, hence never for each other. What is remembered is bounded by the lines
that are in flight.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tidings.users.v1 import users_pb2

# The ASCII form of a label of a domain: what follows is Punycode, which is slow to decode if it is long.
_ASCII_LABEL = re.compile(r"xn--([a-z0-9-]{1,59})")


class Turns:
    """Who is in flight. `taken` must be entered in the order of the file."""

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Event] = {}

    @asynccontextmanager
    async def taken(self, user: users_pb2.User) -> AsyncIterator[None]:
        """Waits for earlier users that may want the same; until the body is done later ones wait for this one."""
        names = names_of(user)
        earlier = [self._last[name] for name in names if name in self._last]
        done = asyncio.Event()
        for name in names:
            self._last[name] = done
        try:
            for one in earlier:
                await one.wait()
            yield
        finally:
            done.set()
            for name in names:
                if self._last[name] is done:
                    del self._last[name]


def names_of(user: users_pb2.User) -> list[str]:
    """What the user may take, coarser than the server's rule: it may be the same for two users whose names differ."""
    names = {"username": _folded(user.username), "email": _folded(user.email)}
    return [f"{field}:{name}" for field, name in names.items() if name]


def _folded(text: str) -> str:
    # Letters and digits alone: the server knows several dots, and characters that count for nothing.
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = unicodedata.normalize("NFKC", _ASCII_LABEL.sub(_unicode_label, plain)).casefold()
    return "".join(character for character in plain if character.isalnum())


def _unicode_label(match: re.Match[str]) -> str:
    try:
        return match[1].encode("ascii").decode("punycode")
    except UnicodeError:
        return match[0]
