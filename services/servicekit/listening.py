"""Sockets that web servers listen on: bound before anything else, so that an address that is taken is said at once."""

from __future__ import annotations

import socket

from servicekit import logs

log = logs.get(__name__)


def bound(address: str) -> socket.socket | None:
    """A listening socket at `host:port` or `[host]:port`; None, and a line in the log, if the address cannot be had."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, dualstack_ipv6=host == "::")
    except OSError as error:
        log.error("address is taken or not allowed", address=address, error=str(error))
        return None


def address_of(listening: socket.socket) -> str:
    """Where a socket listens, as `host:port` or `[host]:port`."""
    host, port, *_ = listening.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
