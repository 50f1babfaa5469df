"""A process that renders one set of templates, as its parent sees it: asked, bounded, and made anew when it dies.

A template that takes too much processor time ends the process, which says so by the signal it died of; the next
request starts another. One that ends otherwise has died of something that is no template's fault as far as anybody
knows: what it was at is tried once more.
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
from collections.abc import Mapping, Sequence
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
# Renderings in one request; each leaves a byte in a pipe, which holds some thousands.
_AT_ONCE = 256

# Files by part, each with the most bytes that it may become, and what templates see.
Rendering = tuple[Mapping[str, tuple[str, int]], Mapping[str, Any]]
# By part: `text` or `problem`.
Said = Mapping[str, Mapping[str, str]]


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
    # Where it says, by a byte, that it begins something.
    progress: int

    def ask(self, request: Any) -> None:
        frame = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        self.connection.sendall(_LENGTH.pack(len(frame)) + frame)

    def answer(self) -> Any:
        (size,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        if size > _LARGEST_ANSWER:
            raise OSError("too large an answer")
        return json.loads(self._receive(size))

    def begun(self) -> int:
        """How much it has begun since this was last asked."""
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self.progress, 1 << 16))
        return 0

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
        os.close(self.progress)
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

    def compile(self, file: str) -> Mapping[str, list[str]]:
        """See the worker. Raises OverTimeError, BrokenProcessError."""
        done, failure = self._done("compile", [file])
        if failure is not None:
            raise failure
        [compiled] = done
        return dict(compiled)

    def render(self, asked: Sequence[Rendering]) -> tuple[list[Said], OverTimeError | BrokenProcessError | None]:
        """Renders one after the other, up to the first that cannot be: what became of those before it, and why not."""
        done: list[Said] = []
        for first in range(0, len(asked), _AT_ONCE):
            some, failure = self._done("render", asked[first : first + _AT_ONCE])
            done += some
            if failure is not None:
                return done, failure
        return done, None

    def _done(self, command: str, asked: Sequence[Any]) -> tuple[list[Any], OverTimeError | BrokenProcessError | None]:
        done: list[Any] = []
        until, died_at = len(asked), set[int]()
        failure: OverTimeError | BrokenProcessError | None = None
        with self._lock:
            while len(done) < until:
                first, begun = len(done), 0
                try:
                    running = self._started()
                    try:
                        running.ask((command, asked[0] if command == "compile" else asked[first:until]))
                        while len(done) < until:
                            answer = running.answer()
                            done += _checked([answer] if command == "compile" else answer, until - len(done))
                    finally:
                        begun = running.begun()
                except (OSError, EOFError, ValueError, struct.error) as error:
                    code = self._end()
                    # What was ready but not handed on is done again; it was at the one that it began last.
                    at = min(max(first + begun - 1, len(done)), until - 1)
                    if code == -signal.SIGPROF:
                        until, failure = at, OverTimeError()
                    elif at in died_at:
                        what = f"the process that renders ended with {code} ({type(error).__name__})"
                        until, failure = at, BrokenProcessError(what)
                    died_at.add(at)
            if self._closed:
                self._end()
        return done, failure

    def _started(self) -> _Running:
        if self._running is None:
            ours, theirs = socket.socketpair()
            progress, tell = os.pipe()
            os.set_blocking(progress, False)
            with theirs, os.fdopen(tell, "wb", buffering=0):
                environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
                process = subprocess.Popen(  # noqa: S603 - this interpreter, and a file of this package
                    [sys.executable, "-I", str(_SCRIPT)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(tell,),
                    env=environment,
                    cwd="/",
                    # A Ctrl-C is for the parent, which ends it in its turn.
                    start_new_session=True,
                )
            ours.settimeout(_PATIENCE)
            self._running = _Running(process, ours, progress)
            self._finalizer = weakref.finalize(self, self._running.end)
            self._running.ask((self._sources, self.bounds.memory, self.bounds.seconds, tell))
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


def _checked(answers: Any, most: int) -> list[Any]:
    """As many answers as may come, at least one; whoever they come from is not trusted."""
    if not isinstance(answers, list) or not 0 < len(answers) <= most:
        raise ValueError("not what was asked for")
    return answers
