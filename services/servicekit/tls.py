"""The certificate that a server is known by, and whether it asks its clients for theirs.

A renewed certificate, key or client CA is used for every handshake after it was read; connections that are open stay.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, cast

import grpc

from servicekit.configfile import InvalidConfigError
from servicekit.mounted import Contents, Mounted

Certificate = Mounted[grpc.ServerCertificateConfiguration]


def certificate(chain: Path, key: Path, client_ca: Path | None) -> Certificate:
    """Reads PEM files. With a client CA every client must show a certificate of it. Raises InvalidConfigError."""
    paths = (chain, key) if client_ca is None else (chain, key, client_ca)

    def make(contents: Contents) -> grpc.ServerCertificateConfiguration:
        _check(chain, key, client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(contents[1], contents[0])], root_certificates=contents[2] if client_ca else None
        )

    return Mounted("certificate", paths, make)


def credentials(current: Certificate, *, ask_clients: bool) -> grpc.ServerCredentials:
    """Credentials that follow the certificate."""
    given = current.value

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before each handshake, in threads of its own; None is no change."""
        nonlocal given
        newest = current.value
        if newest is given:
            return None
        given = newest
        return newest

    # Its stub does not know that the answer may be None.
    return grpc.dynamic_ssl_server_credentials(given, cast("Any", fetch), require_client_authentication=ask_clients)


def _check(chain: Path, key: Path, client_ca: Path | None) -> None:
    # gRPC takes whatever it is given and fails at every handshake; OpenSSL says at once what is wrong.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A passphrase is given so that none is asked for at the terminal.
        context.load_cert_chain(chain, key, password="")
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"{chain}, {key}: not a certificate chain and its key: {error}") from None
    if client_ca is None:
        return
    try:
        context.load_verify_locations(client_ca)
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"{client_ca}: not certificates of authorities: {error}") from None
