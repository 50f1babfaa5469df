"""How the command line gets into the services: its token and its TLS files, given once for whatever command follows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc.aio
import typer

from tidings.cli.exits import CommandError, ExitCode
from tidings.client import connect

_TOKEN = "TIDINGS_CLIENT_TOKEN"  # noqa: S105 - the name of a variable

TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        envvar="TIDINGS_CLIENT_TOKEN_FILE",
        help=f"The file that holds the token of the caller; or {_TOKEN} holds the token itself.",
    ),
]
TlsOption = Annotated[
    bool, typer.Option("--tls", envvar="TIDINGS_CLIENT_TLS", help="TLS, with the authorities that this system trusts.")
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", metavar="FILE", envvar="TIDINGS_CLIENT_CA_FILE", help="TLS, with the authorities in a file."),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--cert", metavar="FILE", envvar="TIDINGS_CLIENT_CERTIFICATE_FILE", help="The certificate to show a service."
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", envvar="TIDINGS_CLIENT_KEY_FILE", help="The key of that certificate."),
]
TokenInClearOption = Annotated[
    bool,
    typer.Option(
        "--token-in-clear",
        envvar="TIDINGS_CLIENT_TOKEN_IN_CLEAR",
        help="Send the token without TLS to other machines, too: something else encrypts.",
    ),
]


@dataclass(frozen=True, slots=True)
class Access:
    """The options. The token itself is none: others on the machine can read command lines."""

    token_file: Path | None = None
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_in_clear: bool = False


# Of the process: it runs one command.
_access = Access()


def use(given: Access) -> None:
    """Remembers the options for the command that follows."""
    global _access
    _access = given


def open_channel(address: str, *, heed_health: bool = True) -> grpc.aio.Channel:
    """A channel as the options have it; without `heed_health` also to a service that is starting or stopping."""
    access = _access
    try:
        return connect(
            address,
            token=None if access.token_file else os.environ.get(_TOKEN) or None,
            token_file=access.token_file,
            tls=access.tls,
            ca=access.ca,
            certificate=access.certificate,
            key=access.key,
            token_in_clear=access.token_in_clear,
            heed_health=heed_health,
        )
    except (ValueError, OSError) as error:
        raise CommandError(str(error), ExitCode.USAGE) from error
