"""Who calls, and what that caller may call.

A source says what a call shows of its caller: `Tokens` knows bearer tokens by their hashes, `anyone` lets everybody in
without a name. `admit` is the one place where a call gets its caller's name, before the servicer sees it; the name is
what request ids, events and limits go by. Other metadata names nobody.

The file of callers has `[[callers]]` tables:

    [[callers]]
    name = "crm"
    hash = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    methods = ["tidings.users.v1.UserService/WatchUsers", "Get*"]

A method is named in full or by its last part, with `*` for any text. Entries of one name are one caller with several
tokens, each good for its own methods.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, cast

import grpc.aio
from pydantic import Field

from servicekit import configfile, logs
from servicekit.configfile import InvalidConfigError
from servicekit.errors import PermissionDeniedError, UnauthenticatedError
from servicekit.mounted import Contents, Mounted

ANONYMOUS = ""

_SCHEME = "sha256:"
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


class Call:
    """Stands for gRPC's context of one call before the servicer: also knows who calls, and reads the metadata once."""

    __slots__ = ("_context", "_metadata", "caller")

    # Calls that this process has begun.
    begun: ClassVar[int] = 0

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        Call.begun += 1
        self._context = context
        self._metadata = context.invocation_metadata() or ()
        self.caller = ANONYMOUS

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """The caller's metadata."""
        return self._metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def name_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The name of who calls, for a servicer that was registered with `guard.add`; empty where callers have none."""
    return cast("Call", context).caller


@dataclass(frozen=True, slots=True)
class Grant:
    """A caller, and the methods (`package.Service/Method`) it may call; None is all."""

    caller: str
    methods: frozenset[str] | None


# Raises UnauthenticatedError for who is not known.
Source = Callable[[Call], Grant]

_ANYONE = Grant(ANONYMOUS, None)


def anyone(call: Call) -> Grant:
    """Everybody, without a name."""
    return _ANYONE


def admit(source: Source, method: str, call: Call) -> None:
    """Gives a call, and what is logged meanwhile, its caller's name. Raises UnauthenticatedError or
    PermissionDeniedError.
    """
    grant = source(call)
    if grant.methods is not None and method not in grant.methods:
        raise PermissionDeniedError(
            f"caller {grant.caller} may not call {method}",
            reason="METHOD_NOT_ALLOWED",
            metadata={"method": method, "caller": grant.caller},
        )
    call.caller = grant.caller
    logs.caller.set(grant.caller)


class Tokens:
    """Callers by the tokens they send as `authorization: Bearer TOKEN`.

    Tokens are compared by looking up their hashes, so that the time it takes tells nothing about a token.
    """

    def __init__(self, path: Path, methods: Collection[str]) -> None:
        """Reads a file of callers of a server with these methods. Raises InvalidConfigError."""
        self.grants: Mounted[dict[bytes, Grant]] = Mounted(
            "callers", (path,), lambda contents: _grants(path, contents, methods)
        )

    def __call__(self, call: Call) -> Grant:
        sent = next((value for key, value in call.invocation_metadata() if key == "authorization"), None)
        if sent is None:
            raise UnauthenticatedError(
                "no token: send the metadata authorization: Bearer TOKEN", reason="MISSING_TOKEN"
            )
        bearer = _BEARER.fullmatch(str(sent))
        grant = self.grants.value.get(_digest(bearer[1])) if bearer else None
        if grant is None:
            raise UnauthenticatedError("the token is not one of this server's callers", reason="UNKNOWN_TOKEN")
        return grant


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class _Entry(configfile.Entry):
    """One token of a caller; the fields are the keys of its table."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    hash: str = Field(pattern=rf"^{_SCHEME}[0-9a-f]{{64}}$")
    methods: tuple[str, ...] = Field(min_length=1)


def _grants(path: Path, contents: Contents, methods: Collection[str]) -> dict[bytes, Grant]:
    entries = configfile.parse(path, contents[0], "callers", _Entry, distinct=False)
    if not entries:
        # Rather a file that was cut off than the wish to lock everybody out.
        raise InvalidConfigError(f"{path}: has no [[callers]]")
    grants: dict[bytes, Grant] = {}
    problems = []
    for entry in entries:
        allowed: set[str] = set()
        for pattern in entry.methods:
            matching = [method for method in methods if _matches(method, pattern)]
            if not matching:
                known = ", ".join(sorted(methods))
                problems.append(f"{path}: caller {entry.name!r}: methods: no {pattern!r} here, there are: {known}")
            allowed.update(matching)
        digest = bytes.fromhex(entry.hash.removeprefix(_SCHEME))
        if digest in grants:
            problems.append(f"{path}: caller {entry.name!r}: hash: is also that of caller {grants[digest].caller!r}")
        grants[digest] = Grant(entry.name, frozenset(allowed))
    if problems:
        raise InvalidConfigError("\n".join(problems))
    return grants


def _matches(method: str, pattern: str) -> bool:
    return fnmatchcase(method, pattern) or fnmatchcase(method.rpartition("/")[2], pattern)
