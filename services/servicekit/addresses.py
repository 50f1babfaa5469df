"""Whom an address that a gRPC server listens on can be reached by."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(address: str) -> bool:
    """Whether nothing but this machine reaches what listens there: a unix socket, or an IP address of the loopback
    interface. A name counts by all the addresses it stands for; what cannot be told is not loopback.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = _host(address)
    if not host:
        return False
    try:
        return _is_loopback_ip(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(_is_loopback_ip(str(where[0])) for *_, where in found)


def _host(address: str) -> str:
    """The host of `host:port`, `[host]:port` or a host alone."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, colon, _ = address.rpartition(":")
    return host if colon and ":" not in host else address


def _is_loopback_ip(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
