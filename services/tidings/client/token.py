"""Bearer tokens: where a channel's token comes from, and a channel that sends it with each call.

gRPC's call credentials start a thread for each call, and its interceptors a task; here the token is put into the
metadata as the call is made, which costs next to nothing and is the same with TLS and without.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what RFC 6750 allows


def checked(token: str) -> str:
    """The token without white space around it. Raises ValueError, which does not repeat it."""
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        raise ValueError("not a token: it is empty, or has characters that a token cannot have")
    return token


class TokenFile:
    """The token in a file, read again when the file changes. A file that holds none changes nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the file. Raises OSError or ValueError."""
        self._path = Path(path)
        self._seen = self._look()
        try:
            self._token = checked(self._path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __call__(self) -> str:
        """The token."""
        try:
            seen = self._look()
            if seen != self._seen:
                self._token = checked(self._path.read_text())
                self._seen = seen
        except (OSError, ValueError):
            pass  # the server says whether the last one is still good
        return self._token

    def _look(self) -> tuple[int, int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino


class TokenChannel(grpc.aio.Channel):
    """A channel whose every call carries a token in its metadata."""

    def __init__(self, channel: grpc.aio.Channel, token: Callable[[], str]) -> None:
        self._channel = channel
        self._token = token

    def _carrying(self, call: Any) -> Any:
        token = self._token

        def made(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
            return call(*arguments, metadata=(*(metadata or ()), ("authorization", f"Bearer {token()}")), **options)

        return made

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """A method with one request and one answer."""
        return self._carrying(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """A method with one request and many answers."""
        return self._carrying(self._channel.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """A method with many requests and one answer."""
        return self._carrying(self._channel.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """A method with many requests and many answers."""
        return self._carrying(self._channel.stream_stream(*arguments, **options))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The state of the connection."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Returns when the state is another."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Returns when there is a connection."""
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel."""
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        await self._channel.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._channel.__aexit__(kind, error, trace)
