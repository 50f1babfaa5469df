"""A process that has imported a program and forks off a process for each run of it: `nursery.py MODULE FD IMPORT...`

A request is a packet on the socket FD: JSON, and beside it the descriptors for output and errors. The answer names the
new process, and another packet says later how that ended. The new process has a session, an environment and arguments
of its own and runs the program from its first line, as `python -m MODULE ARGUMENT...` does. It is killed if this one
dies.

Nothing is imported here that the program would not import itself, and nothing runs: no thread, no event loop.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_LONGEST_REQUEST = 1 << 20


def main() -> None:
    """Serves until nobody is left to ask; in each new process it runs the program."""
    module, connection = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    sys.path[0] = os.getcwd()  # noqa: PTH109 - as `python -m` has it
    for name in sys.argv[3:]:
        importlib.import_module(name)
    # It is run from its first line, and runpy would warn of one that is there.
    sys.modules.pop(f"{module}.__main__", None)
    gc.collect()
    gc.freeze()
    if (arguments := _serve(connection)) is not None:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(connection: socket.socket) -> list[str] | None:
    """Forks for each request. Returns None here when it is over, and in a new process its arguments."""
    itself = os.getpid()
    signal.signal(signal.SIGCHLD, lambda *_: _reap(connection))
    while True:
        packet, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_REQUEST, 2)
        if not packet:
            return None
        # Its end is told after its beginning.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            connection.close()
            return _begin(json.loads(packet), descriptors, itself)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(json.dumps({"begun": pid}).encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _reap(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        connection.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _begin(request: dict[str, Any], descriptors: list[int], parent: int) -> list[str]:
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # One that died before the request would never be noticed.
    if os.getppid() != parent:
        os._exit(1)
    for target, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    # What they were made for may have been a file or a terminal.
    sys.stdout = _stream(sys.stdout, 1, by_lines=False)
    sys.stderr = _stream(sys.stderr, 2, by_lines=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
    return list(request["arguments"])


def _stream(before: Any, descriptor: int, *, by_lines: bool) -> io.TextIOWrapper:
    buffer = open(descriptor, "wb", 0 if before.write_through else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        buffer, before.encoding, before.errors, "\n", line_buffering=by_lines, write_through=before.write_through
    )


if __name__ == "__main__":
    main()
