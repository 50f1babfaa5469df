"""Where a feed keeps its place between runs.

A store holds one resume token. The feed loads it whenever it connects and saves after a batch has been processed, so
that a crash repeats at most what was being processed. Whoever stores the token in the transaction that holds what came
of the events, and makes `save` do nothing, has exactly one effect per event.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Protocol


class CursorStore(Protocol):
    """Anything that can hold a resume token."""

    async def load(self) -> str | None:
        """The token to go on after; None to begin where the feed's `start` says."""
        ...

    async def save(self, token: str) -> None:
        """Keeps a token."""
        ...


class MemoryCursor:
    """Holds the token as long as the process lives."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    async def load(self) -> str | None:
        """The token, if there is one."""
        return self.token

    async def save(self, token: str) -> None:
        """Keeps a token."""
        self.token = token


class FileCursor:
    """Holds the token in a file: the old one or the new one, never a part, and on disk when `save` returns."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    async def load(self) -> str | None:
        """The token in the file; None if there is no file or it is empty."""
        try:
            return (await asyncio.to_thread(self._path.read_text, "ascii")).strip() or None
        except FileNotFoundError:
            return None

    async def save(self, token: str) -> None:
        """Replaces the file."""
        # Begun at once and shielded: a caller that is cancelled here leaves a whole write behind, not a lost one.
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._replace, token))

    def _replace(self, token: str) -> None:
        directory = self._path.parent
        descriptor, unfinished = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=directory)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(f"{token}\n")
                file.flush()
                os.fsync(file.fileno())
            Path(unfinished).replace(self._path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
        # Without this the directory may still name the old file after a power cut.
        opened = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
