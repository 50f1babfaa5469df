"""How callers get into a server: its addresses, its certificate, and the source of its callers' names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import grpc

from servicekit import callers, telemetry, tls
from servicekit.addresses import is_loopback
from servicekit.mounted import Mounted
from servicekit.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Entrance:
    """What the settings of a server come to. `followed` are the files that it rests on."""

    address: str
    # Serves health alone, without TLS; nothing if empty.
    health_address: str
    source: callers.Source
    credentials: grpc.ServerCredentials | None
    followed: tuple[Mounted[Any], ...]
    reflection: bool = True
    channelz: bool = False
    # What of the settings is only right on one's own machine, in single words for `tidings doctor`.
    notes: tuple[str, ...] = ()


def open_entrance(settings: ServerSettings, methods: Collection[str]) -> Entrance:
    """Reads the files that the settings name; `methods` are those of the server. Raises InvalidConfigError."""
    source: callers.Source = callers.anyone
    credentials = None
    followed: list[Mounted[Any]] = []
    if settings.callers_file is not None:
        tokens = callers.Tokens(settings.callers_file, methods)
        followed.append(tokens.grants)
        source = tokens
    if settings.tls_certificate_file is not None and settings.tls_key_file is not None:
        client_ca = settings.tls_client_ca_file
        certificate = tls.certificate(settings.tls_certificate_file, settings.tls_key_file, client_ca)
        followed.append(certificate)
        credentials = tls.credentials(certificate, ask_clients=client_ca is not None)
    return Entrance(
        settings.listen,
        settings.health_listen,
        source,
        credentials,
        tuple(followed),
        reflection=settings.reflection,
        channelz=settings.channelz,
        notes=_notes(settings),
    )


def _notes(settings: ServerSettings) -> tuple[str, ...]:
    table = {
        "local": is_loopback(settings.listen),
        "no-callers": settings.callers_file is None,
        "no-tls": settings.tls_certificate_file is None,
        "no-telemetry": not telemetry.enabled(),
    }
    return tuple(note for note, holds in table.items() if holds)
