"""Where a process of the run writes its records: a file outside of the system that only grows.

`note` keeps a record in memory, in order; `sure` returns once it and all before it are on the disk. Many waiters share
an fsync.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.proof.records import Record, dump

_HELD = 1 << 20


class Journal:
    """Use from one event loop; `close` at the end."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._held: list[bytes] = []
        self._bytes = 0
        self._syncing = asyncio.Lock()
        self._noted = 0
        self._synced = 0

    def note(self, record: Record) -> None:
        """Adds a record."""
        line = dump(record)
        self._held.append(line)
        self._bytes += len(line)
        self._noted += 1
        if self._bytes > _HELD:
            self._write()

    async def sure(self, *records: Record) -> None:
        """Adds records and returns when they are safe."""
        for record in records:
            self.note(record)
        wanted = self._noted
        async with self._syncing:
            if self._synced >= wanted:
                return
            reached = self._noted
            self._write()
            await asyncio.to_thread(os.fdatasync, self._file)
            self._synced = reached

    def _write(self) -> None:
        data, self._held, self._bytes = b"".join(self._held), [], 0
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Writes what is held."""
        self._write()
        os.fdatasync(self._file)
        os.close(self._file)
