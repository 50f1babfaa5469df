"""The command line `tidings`: tables for people, one JSON object per line for programs (`--json`).

Data goes to standard output, progress and errors to standard error. An error is one line that names the field.

Exit codes:
    0    done
    1    something unexpected; `doctor`: the system is ill
    2    wrong usage: an option, an argument, the header of a file
    3    refused as invalid
    4    not found
    5    conflict: already exists, stale version, not parked
    6    a service is not available, or did not answer in time
    7    import: finished, but some lines were bad
    8    not allowed: no token, or one that is not known or may not do this
    130  interrupted with Ctrl-C
"""

from tidings.cli.app import main

__all__ = ["main"]
