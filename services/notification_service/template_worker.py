"""The process that renders: a script that is run by itself, in isolated mode, with nothing but Jinja and this file.

Templates are programs. The sandbox keeps them from reaching what is not theirs, but neither from looping for ever nor
from making gigabytes, not even while they are compiled (constants are folded). So all that Jinja does happens here,
where the kernel ends it: each request has so much processor time, after which the process is killed by a timer that no
template can stop, and the process has so much memory. What else the machine does costs a template nothing, for the
time is its own.

It speaks with its parent over the socket at descriptor 0: frames with their length before them, pickled towards here,
JSON towards the parent, who is not to trust what comes from here. A request may be for many renderings; each is bounded
on its own, and a pipe gets one byte when it begins, so that the parent knows which of them the process has died of. It
ends with its parent.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
import sys
import time
import zoneinfo
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from types import TracebackType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LENGTH = struct.Struct(">I")
_LONGEST_REASON = 300
# What has been rendered is handed on after so many characters, for it counts as memory, and after so many seconds, for
# the parent waits for a sign of life.
_MOST_KEPT, _LONGEST_KEPT = 1 << 20, 0.02

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class _TooLargeError(Exception):
    """A part became larger than it may be."""


def moment(value: datetime, time_zone: str = "") -> str:
    """A time as people read it, in a time zone; in UTC if that is empty or not known."""
    zone: tzinfo = UTC
    if time_zone:
        try:
            zone = zoneinfo.ZoneInfo(time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            zone = UTC
    return value.astimezone(zone).strftime("%Y-%m-%d %H:%M %Z")


def _is_html(name: str | None) -> bool:
    return bool(name and name.endswith(".html"))


def _environment(sources: Mapping[str, str]) -> jinja2.Environment:
    def load(name: str) -> tuple[str, str, None] | None:
        # The name stands for the path, so that a traceback names it.
        return (sources[name], name, None) if name in sources else None

    made = ImmutableSandboxedEnvironment(
        loader=jinja2.FunctionLoader(load),
        autoescape=_is_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        cache_size=-1,
    )
    made.filters["moment"] = moment
    return made


class _Worker:
    """Answers requests about one set of files."""

    def __init__(self, sources: Mapping[str, str], memory: int) -> None:
        self._sources = sources
        self._memory = memory
        self._environment = _environment(sources)

    def compile(self, file: str) -> dict[str, Any]:
        """Compiles a file: `problems`, and the `references` to others that it cannot do without."""
        problems: list[str] = []
        references: list[str] = []
        try:
            self._environment.get_template(file)
            tree = self._environment.parse(self._sources[file], file, file)
            for node in tree.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
                named = _named(node)
                references += [name for name in named if name in self._sources]
                if named and not any(name in self._sources for name in named):
                    problems.append(f"template {file}, line {node.lineno}: {' or '.join(named)} is missing")
        except Exception as error:
            problems.append(self._reason(file, error))
        return {"problems": problems, "references": references}

    def render(
        self, requests: Sequence[tuple[Mapping[str, tuple[str, int]], Mapping[str, Any]]], begin: Callable[[], None]
    ) -> Iterator[list[dict[str, dict[str, str]]]]:
        """Renders files by part, each with the most bytes that it may become, for one context after the other: `text`
        or `problem` by part, in lists of as many as are ready. Calls `begin` before each.
        """
        ready: list[dict[str, dict[str, str]]] = []
        size, since = 0, time.monotonic()
        for parts, context in requests:
            begin()
            # Made once for all parts, and changed by none.
            seen = {**self._environment.globals, **context}
            ready.append({part: self._part(file, most, seen) for part, (file, most) in parts.items()})
            size += sum(len(text) for part in ready[-1].values() for text in part.values())
            if size > _MOST_KEPT or time.monotonic() - since > _LONGEST_KEPT:
                yield ready
                ready, size, since = [], 0, time.monotonic()
        if ready:
            yield ready

    def _part(self, file: str, most: int, seen: dict[str, Any]) -> dict[str, str]:
        try:
            pieces: list[str] = []
            size = 0
            for piece in self._pieces(file, seen):
                size += len(piece)
                if size > most:
                    raise _TooLargeError
                pieces.append(piece)
            # NUL is the one character that Postgres' text cannot hold, and half a character is none.
            encoded = "".join(pieces).replace("\0", "").encode("utf-8", "replace")
            if len(encoded) > most:
                raise _TooLargeError
            return {"text": encoded.decode()}
        except _TooLargeError:
            return {"problem": f"template {file}: becomes larger than {most:,} bytes"}
        except Exception as error:
            return {"problem": self._reason(file, error)}

    def _pieces(self, file: str, seen: dict[str, Any]) -> Iterator[str]:
        """As Template.generate, which makes a dict of all that is seen anew for each file."""
        template = self._environment.get_template(file)
        try:
            yield from template.root_render_func(template.new_context(seen, shared=True))
        except Exception:
            self._environment.handle_exception()

    def _reason(self, file: str, error: Exception) -> str:
        match error:
            case jinja2.TemplateNotFound():
                text = f"template {error.name} is missing"
            case jinja2.TemplateSyntaxError():
                text = f"template {error.name or file}, line {error.lineno}: {error.message}"
            case MemoryError():
                text = f"template {file}: takes more than {self._memory >> 20} MiB of memory"
            case _:
                where, line = _place(error.__traceback__, self._sources)
                at = f"{where}, line {line}" if line else file
                text = f"template {at}: {type(error).__name__}: {error}"
        return text[:_LONGEST_REASON].encode("utf-8", "replace").decode()


def _named(node: nodes.Node) -> list[str]:
    """The templates that a statement needs one of; none if they are not known before it runs, or may be missing."""
    if isinstance(node, nodes.Include) and node.ignore_missing:
        return []
    expression = getattr(node, "template", None)
    if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
        return [expression.value]
    if isinstance(expression, (nodes.List, nodes.Tuple)):
        constants = [one.value for one in expression.items if isinstance(one, nodes.Const)]
        return constants if len(constants) == len(expression.items) else []
    return []


def _place(trace: TracebackType | None, sources: Mapping[str, str]) -> tuple[str, int]:
    """The file and line of a template where an error happened; Jinja's tracebacks have them."""
    found = "", 0
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name in sources:
            found = name, trace.tb_lineno
        trace = trace.tb_next
    return found


def _bounded(memory: int) -> None:
    """No more memory than this; nothing to be left behind on a disk."""
    import resource

    for limit, value in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        hard = resource.getrlimit(limit)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = connection.recv(min(size - len(received), 1 << 20))
        if not piece:
            sys.exit(0)
        received += piece
    return bytes(received)


def _request(connection: socket.socket) -> Any:
    (size,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    return pickle.loads(_receive(connection, size))  # noqa: S301 - of the parent, who has made this process


def main() -> None:
    """Answers requests until the parent ends."""
    connection = socket.socket(fileno=0)
    sources, memory, seconds, progress = _request(connection)
    _bounded(memory)
    worker = _Worker(sources, memory)

    def begin() -> None:
        os.write(progress, b".")
        # The signal is not handled: the kernel ends the process, wherever in a template it is.
        signal.setitimer(signal.ITIMER_PROF, seconds)

    def send(answer: Any) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        frame = _encode(answer).encode()
        connection.sendall(_LENGTH.pack(len(frame)) + frame)

    while True:
        command, argument = _request(connection)
        if command == "compile":
            begin()
            send(worker.compile(argument))
        else:
            for ready in worker.render(argument, begin):
                send(ready)


if __name__ == "__main__":
    main()
