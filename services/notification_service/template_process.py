"""A process that renders one set of templates, as its parent sees it: asked, bounded, and made anew when it dies.

A template that takes too much processor time ends the process, which says so by the signal it died of; the next
request starts another. One that ends otherwise has died of something that is no template's fault as far as anybody
knows: the request is made once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("template_worker.py")
_LENGTH = struct.Struct(">I")
_LARGEST_ANSWER = 64 << 20
# What a process of its own gets of the environment: no settings, for they hold secrets.
_INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONTZPATH")
# Not a bound of templates: of a process that the machine does not let run, seconds.
_PATIENCE = 60.0


class OverTimeError(Exception):
    """A request took more processor time than it may."""


class BrokenProcessError(Exception):
    """The process has died twice over one request, or does not answer."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What rendering may take: memory of the process in bytes, processor time of a request in seconds."""

    memory: int = 96 << 20
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    connection: socket.socket

    def ask(self, request: Any) -> None:
        frame = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        self.connection.sendall(_LENGTH.pack(len(frame)) + frame)

    def answer(self) -> dict[str, Any]:
        (size,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        if size > _LARGEST_ANSWER:
            raise OSError("too large an answer")
        answer: dict[str, Any] = json.loads(self._receive(size))
        return answer

    def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            piece = self.connection.recv(size - len(received))
            if not piece:
                raise EOFError
            received += piece
        return bytes(received)

    def end(self) -> int:
        """Ends the process unless it has ended; how it did."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # It ends by itself when it is not asked any more, and it may be dying.
            return self.process.wait(0.2)
        self.process.kill()
        return self.process.wait()


class RenderingProcess:
    """Renders a set of files. Its methods may be called in any thread, one request runs at a time."""

    def __init__(self, sources: Mapping[str, str], bounds: Bounds) -> None:
        self.bounds = bounds
        self._sources = dict(sources)
        self._lock = threading.Lock()
        self._closed = False
        self._running: _Running | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def compile(self, file: str) -> dict[str, Any]:
        """See the worker. Raises OverTimeError, BrokenProcessError."""
        return self._request("compile", file)

    def render(self, parts: Mapping[str, tuple[str, int]], context: Mapping[str, Any]) -> dict[str, Any]:
        """See the worker. Raises OverTimeError, BrokenProcessError."""
        return self._request("render", dict(parts), dict(context))

    def _request(self, *request: Any) -> dict[str, Any]:
        with self._lock:
            problem = ""
            for _ in range(2):
                try:
                    running = self._started()
                    running.ask(request)
                    answer = running.answer()
                except (OSError, EOFError, ValueError, struct.error) as error:
                    code = self._end()
                    if code == -signal.SIGPROF:
                        raise OverTimeError from None
                    problem = f"the process that renders ended with {code} ({type(error).__name__})"
                    continue
                if self._closed:
                    self._end()
                return answer
            raise BrokenProcessError(problem)

    def _started(self) -> _Running:
        if self._running is None:
            ours, theirs = socket.socketpair()
            with theirs:
                environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
                process = subprocess.Popen(  # noqa: S603 - this interpreter, and a file of this package
                    [sys.executable, "-I", str(_SCRIPT)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    cwd="/",
                    # A Ctrl-C is for the parent, which ends it in its turn.
                    start_new_session=True,
                )
            ours.settimeout(_PATIENCE)
            self._running = _Running(process, ours)
            self._finalizer = weakref.finalize(self, self._running.end)
            self._running.ask((self._sources, self.bounds.memory, self.bounds.seconds))
        return self._running

    def _end(self) -> int:
        running, self._running = self._running, None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        return running.end() if running is not None else 0

    def close(self) -> None:
        """Ends the process when the request that it is at is answered. A later request starts one for itself."""
        with self._lock:
            self._closed = True
            self._end()
