"""Where webhooks may go: every spelling of an address that leads inside is refused, before a byte is sent."""

from __future__ import annotations

import asyncio
import re
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from notification_service import egress
from notification_service.channels import Message
from notification_service.channels.webhook import WebhookChannel
from notification_service.domain import Result
from notification_service.endpoints import Endpoint
from notification_service.registry import Endpoints
from notification_service.settings import NotificationServiceSettings
from servicekit.settings import InvalidSettingsError, load
from tests.harness import free_port

PUBLIC = ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1")
FORBIDDEN = (
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:7f00:1:0:0:f7f7:f7f7",
    "2001:0:808:808:0:0:5601:5601",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "not an address",
)


def test_the_docs_name_what_is_tried() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = text.partition("| refused | for example |")[2].partition("\n\n")[0]
    named = {one for row in table.splitlines()[2:-1] for one in re.findall("`([^`]+)`", row)}
    assert named
    assert named <= set(FORBIDDEN)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    egress.check(address)


@pytest.mark.parametrize("address", FORBIDDEN)
def test_what_leads_inside_is_refused(address: str) -> None:
    with pytest.raises(egress.ForbiddenAddressError):
        egress.check(address)


def test_an_operator_allows_networks_by_what_an_address_means() -> None:
    allowed = (egress.network("10.1.0.0/16"), egress.network("fd00::/8"))
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "fd12::1"):
        egress.check(address, allowed)
    for address in ("10.2.0.1", "127.0.0.1", "::1", "fe80::1"):
        with pytest.raises(egress.ForbiddenAddressError):
            egress.check(address, allowed)


class Listener:
    """Counts who connects to this machine."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()


async def _attempt(url: str, *networks: str) -> tuple[Result, str]:
    endpoint = Endpoint.model_validate({"name": "x", "url": url, "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"})
    channel = WebhookChannel(
        Endpoints([endpoint.destination()]),
        connections=1,
        timeout=5,
        networks=[egress.network(one) for one in networks],
    )
    try:
        outcome = await channel.send(Message(url, str(uuid.uuid4()), b"{}", datetime.now(UTC), "", ""))
    finally:
        await channel.close()
    return outcome.result, outcome.detail


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"],
)  # fmt: skip
async def test_no_spelling_of_this_machine_is_connected_to(host: str) -> None:
    listener = Listener()
    listener.port = free_port()
    async with await asyncio.start_server(listener.accept, ["127.0.0.1"], listener.port):
        result, detail = await _attempt(f"http://{host}:{listener.port}/hook")
        assert listener.connections == 0
        assert result in (Result.REFUSED, Result.FAILED)
        # What is neither an address nor taken for one by the system's resolver fails as a name.
        assert any(said in detail for said in ("is not a public address", "is no IP address", "DNS")), detail
        allowed, _ = await _attempt(f"http://127.0.0.1:{listener.port}/hook", "127.0.0.0/8")
        assert (allowed, listener.connections) == (Result.SUCCEEDED, 1)


async def test_a_name_that_also_means_something_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
            for address in ("93.184.216.34", "169.254.169.254")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    result, detail = await _attempt("http://rebinding.example/hook")
    assert result is Result.REFUSED
    assert detail == ("169.254.169.254 is not a public address; TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS allows others")


def test_a_wrong_network_is_named() -> None:
    with pytest.raises(InvalidSettingsError, match=r"^TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS: .*10\.0\.0\.1/8"):
        load(NotificationServiceSettings, database_url="postgresql://", webhook_networks="10.0.0.1/8")
