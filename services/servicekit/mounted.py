"""Values made of mounted files, made again when a file changes.

Files are looked at by their content, so that it does not matter how they are replaced: a new file by the name, a link
that leads elsewhere (as Kubernetes mounts Secrets), or another content. What is used was read at one moment: if a file
changes while it is read, all are read again. A file that cannot be used changes nothing: the value stays, and the log
says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from servicekit import logs
from servicekit.configfile import InvalidConfigError

log = logs.get(__name__)

Value = TypeVar("Value")

Contents = tuple[bytes, ...]


class Mounted(Generic[Value]):
    """What `make` makes of the files' contents, in the order of `paths`; it raises InvalidConfigError if it cannot.

    `value` is the newest that could be made, and another object after each change. `name` is for the log.
    """

    def __init__(self, name: str, paths: Sequence[Path], make: Callable[[Contents], Value]) -> None:
        self.name = name
        self._paths = tuple(paths)
        self._make = make
        self._contents, self.value = self._load(self._read())

    async def follow(self, interval: float = 2.0) -> None:
        """A background loop: looks at the files every so many seconds."""
        said = ""
        while True:
            await asyncio.sleep(interval)
            try:
                changed = await asyncio.to_thread(self._changed)
            except InvalidConfigError as error:
                if str(error) != said:
                    said = str(error)
                    log.error("a changed file cannot be used; what was read before stays", name=self.name, error=said)
                continue
            said = ""
            if changed is not None:
                self._contents, self.value = changed
                log.info("a changed file is used", name=self.name, files=[str(path) for path in self._paths])

    def _changed(self) -> tuple[Contents, Value] | None:
        contents = self._read()
        return None if contents == self._contents else self._load(contents)

    def _load(self, contents: Contents) -> tuple[Contents, Value]:
        while True:
            try:
                value = self._make(contents)
            except InvalidConfigError:
                again = self._read()
                if again == contents:
                    raise
            else:
                again = self._read()
                if again == contents:
                    return contents, value
            contents = again

    def _read(self) -> Contents:
        try:
            return tuple([path.read_bytes() for path in self._paths])
        except OSError as error:
            raise InvalidConfigError(f"{error.filename}: {error.strerror}") from None
