"""Names of Services, answered as a cluster's DNS answers for headless ones: the addresses of the ready pods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

PORT = 53
_TTL = 5

# The addresses of a name, or None for a name that nobody has.
Lookup = Callable[[str], list[str] | None]


def answer(query: dns.message.Message, lookup: Lookup) -> dns.message.Message:
    """The response to a query: IPv4 addresses only, for the network of the containers has no others."""
    response = dns.message.make_response(query, recursion_available=True)
    response.flags |= dns.flags.AA
    [question] = query.question
    addresses = lookup(question.name.to_text(omit_final_dot=True).lower())
    if addresses is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
    elif addresses and question.rdtype == dns.rdatatype.A:
        response.answer.append(
            dns.rrset.from_text_list(question.name, _TTL, dns.rdataclass.IN, dns.rdatatype.A, addresses)
        )
    return response


class _Server(asyncio.DatagramProtocol):
    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, int]) -> None:
        self._transport.sendto(answer(dns.message.from_wire(data), self._lookup).to_wire(), addr)


@asynccontextmanager
async def served(host: str, lookup: Lookup) -> AsyncIterator[None]:
    """Answers on port 53 of an address for as long as the context lasts."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Server(lookup), local_addr=(host, PORT)
    )
    try:
        yield
    finally:
        transport.close()
