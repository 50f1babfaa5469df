"""Becomes another program that cannot outlive its supervisor: `python child.py SUPERVISOR_PID PROGRAM ARGUMENT...`

The kernel sends SIGKILL at the death of the parent (Linux; elsewhere the program runs without that safety). The request
is made here, in the new process, and exec keeps it; so the supervisor runs no Python between fork and exec. This file
is run with `-S`: it needs nothing but the standard library, and a few milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks for the signal, then execs."""
    supervisor, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # A supervisor that died before the request would never be noticed.
        if os.getppid() != supervisor:
            raise SystemExit(1)
    os.execvp(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main()
