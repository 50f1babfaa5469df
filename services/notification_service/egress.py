"""Where webhooks may go: to public addresses, and to the networks that the operator allows besides.

A URL names a host; what counts is the address that is connected to. Every address that a name resolves to is checked,
the connection goes to a checked one, and the name is not asked again in between: a name server that answers differently
the second time gains nothing. IPv4 addresses inside IPv6 ones (mapped, compatible, NAT64, 6to4, Teredo) are checked as
what they are. Other spellings of an address (`0x7f.1`, `2130706433`) are resolved by the system first, or refused.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

Network = IPv4Network | IPv6Network

# An IPv4 address at the end of an IPv6 one: compatible, NAT64 (well known and local), translated.
_TAILS = tuple(map(IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))
# Beside what `is_global` refuses in every release of Python: protocol assignments, benchmarks, old site-local.
_REFUSED = tuple(map(ip_network, ("192.0.0.0/24", "198.18.0.0/15", "192.88.99.0/24", "fec0::/10", "100::/64")))


class ForbiddenAddressError(OSError):
    """An address is not one that webhooks may go to."""


def network(text: str) -> Network:
    """A network as an operator writes it: `10.0.0.0/8`, `fd00::/8`, or one address. Raises ValueError."""
    return ip_network(text)


def check(address: str, allowed: Sequence[Network] = ()) -> None:
    """Raises ForbiddenAddressError unless an address and all that it stands for are public or allowed."""
    try:
        meant = ip_address(address.partition("%")[0])
    except ValueError:
        raise ForbiddenAddressError(f"{address!r} is no IP address") from None
    for one in _meanings(meant):
        is_allowed = any(one.version == network.version and one in network for network in allowed)
        if not (is_allowed or _is_public(one)):
            raise ForbiddenAddressError(f"{address} is not a public address")


def _meanings(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address | IPv6Address]:
    """The addresses that a packet to this one may end at: itself, or the IPv4 ones inside."""
    if isinstance(address, IPv4Address):
        yield address
        return
    inside: list[IPv4Address] = []
    if address.ipv4_mapped is not None:
        inside.append(address.ipv4_mapped)
    elif address.sixtofour is not None:
        inside.append(address.sixtofour)
    elif address.teredo is not None:
        inside.extend(address.teredo)
    elif int(address) > 1 and any(address in one for one in _TAILS):
        inside.append(IPv4Address(int(address) & 0xFFFFFFFF))
    if inside:
        yield from inside
    else:
        yield address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    return (
        address.is_global
        and not address.is_multicast
        and not any(address.version == network.version and address in network for network in _REFUSED)
    )


class CheckedResolver(AbstractResolver):
    """The system's resolver, whose answers are refused if any of them is forbidden: what a name also means may be what
    is connected to.
    """

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = tuple(allowed)
        self._system = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._system.resolve(host, port, family)
        for one in found:
            check(one["host"], self._allowed)
        return found

    async def close(self) -> None:
        await self._system.close()
