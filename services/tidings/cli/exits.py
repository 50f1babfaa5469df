"""How a command ends: exit codes, and every error as one line on standard error."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import grpc
import typer

from tidings.cli import output
from tidings.client import ApiError, FeedRefusedError, TidingsError


class ExitCode(IntEnum):
    """The exit codes, as the package's docstring explains them."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INVALID = 3
    NOT_FOUND = 4
    CONFLICT = 5
    UNAVAILABLE = 6
    BAD_LINES = 7
    DENIED = 8
    INTERRUPTED = 130


EXIT_CODES_HELP = """\b
Exit codes:
  0    done
  1    something unexpected; doctor: the system is ill
  2    wrong usage: an option, an argument, the header of a file
  3    refused as invalid
  4    not found
  5    conflict: already exists, stale version, not parked
  6    a service is not available, or did not answer in time
  7    import: finished, but some lines were bad
  8    not allowed: no token, or one that is not known or may not do this
  130  interrupted with Ctrl-C
"""

_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.INVALID,
    grpc.StatusCode.OUT_OF_RANGE: ExitCode.INVALID,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.INVALID,
    grpc.StatusCode.UNIMPLEMENTED: ExitCode.INVALID,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.DENIED,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.DENIED,
    grpc.StatusCode.NOT_FOUND: ExitCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: ExitCode.CONFLICT,
    grpc.StatusCode.ABORTED: ExitCode.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: ExitCode.CONFLICT,
}


class CommandError(Exception):
    """A command cannot do what it was asked to; the message says why."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


def exit_code_of(error: ApiError) -> ExitCode:
    """The exit code that stands for a refused call."""
    if error.is_temporary:
        return ExitCode.UNAVAILABLE
    return _BY_STATUS.get(error.code, ExitCode.UNEXPECTED)


def text_of(error: ApiError) -> str:
    """What is wrong, with the field in front."""
    if error.violations:
        return "; ".join(f"{violation.field}: {violation.description}" for violation in error.violations)
    return error.message


def _explained(error: CommandError | TidingsError | OSError) -> tuple[str, ExitCode]:
    match error:
        case CommandError():
            return str(error), error.code
        case ApiError():
            return text_of(error), exit_code_of(error)
        case FeedRefusedError():
            denied = _BY_STATUS.get(error.error.code) is ExitCode.DENIED
            return text_of(error.error), ExitCode.DENIED if denied else ExitCode.INVALID
        case _:
            return str(error), ExitCode.UNEXPECTED


@contextmanager
def reported() -> Iterator[None]:
    """Ends the command with one line and an exit code if its body fails."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough. What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.OK) from None
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (CommandError, TidingsError, OSError) as error:
        message, code = _explained(error)
        output.error(message)
        raise typer.Exit(code) from None


def run(command: Coroutine[Any, Any, None]) -> None:
    """Runs a command's body in an event loop of its own."""
    with reported():
        asyncio.run(command)
