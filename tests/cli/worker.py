"""Runs many commands in one process, for starting Python takes longer than most of them: a JSON line in, one out.

They share one event loop. gRPC hands what is left of a cancelled call to its loop; if that is closed by then, the next
loop of the process prints a traceback. A command has its process, and so its loop, for itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from unittest import mock

from typer.testing import CliRunner

from tidings.cli.app import app


def main() -> None:
    """Serves until its standard input ends."""
    with asyncio.Runner() as runner, mock.patch("asyncio.run", runner.run):
        _serve()


def _serve() -> None:
    requests, answers = sys.stdin, sys.stdout
    for line in requests:
        request = json.loads(line)
        os.chdir(request["directory"])
        given = request["stdin"].encode("latin-1")
        result = CliRunner().invoke(
            app, request["arguments"], input=given, env=request["environment"], prog_name="tidings"
        )
        unexpected = result.exception and not isinstance(result.exception, SystemExit)
        trace = "".join(traceback.format_exception(result.exception)) if unexpected else ""
        answer = {"code": result.exit_code, "out": result.stdout, "err": result.stderr + trace}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
