"""TLS of a running user service: who is believed, and how certificates are renewed under open streams."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.harness import Authority, Database, ServiceProcess, Services, until
from tests.users.calls import Stub, create, read, refused
from tidings.client import ApiError, Users, connect
from tidings.users.v1 import users_pb2

NO_HANDSHAKE = grpc.StatusCode.UNAVAILABLE
Request = users_pb2.WatchUsersRequest


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A certificate authority."""
    return Authority(tmp_path)


@pytest.fixture
def strangers(tmp_path: Path) -> Authority:
    """Another one."""
    (tmp_path / "strangers").mkdir()
    return Authority(tmp_path / "strangers")


async def start(services: Services, database: Database, authority: Authority, **settings: object) -> ServiceProcess:
    """A user service with a certificate."""
    certificate, key = authority.issue("server")
    files = {"tls_certificate_file": certificate, "tls_key_file": key, "health_listen": "127.0.0.1:0"}
    return await services.users(database, **files, **settings).start()


async def refused_with(address: str, **credentials: Path) -> grpc.StatusCode | None:
    """What a call is refused with; None if it is answered."""
    async with connect(address, **credentials) as channel:
        try:
            await Users(channel, timeout=10).feed()
        except ApiError as error:
            return error.code
        return None


def shown(address: str) -> str:
    """The certificate that a server shows at a new connection."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


async def test_the_server_is_known_by_its_certificate(
    services: Services, users_database: Database, authority: Authority, strangers: Authority
) -> None:
    service = await start(services, users_database, authority)
    assert await refused_with(service.address, ca=authority.ca) is None
    assert await refused_with(service.address, ca=strangers.ca) is NO_HANDSHAKE
    assert await refused_with(service.address) is NO_HANDSHAKE
    # The address for probes serves nothing else.
    async with grpc.aio.insecure_channel(service.health_address) as channel:
        said = await refused(Stub(channel).GetFeed(users_pb2.GetFeedRequest()))
        assert said.code is grpc.StatusCode.UNIMPLEMENTED
    assert await service.stop() == 0


async def test_clients_must_show_theirs_if_asked(
    services: Services, users_database: Database, authority: Authority, strangers: Authority
) -> None:
    service = await start(services, users_database, authority, tls_client_ca_file=authority.ca)
    certificate, key = authority.issue("client", "client")
    assert await refused_with(service.address, ca=authority.ca, certificate=certificate, key=key) is None
    assert await refused_with(service.address, ca=authority.ca) is NO_HANDSHAKE
    certificate, key = strangers.issue("client", "client")
    assert await refused_with(service.address, ca=authority.ca, certificate=certificate, key=key) is NO_HANDSHAKE


async def test_a_renewed_certificate_is_shown_and_streams_go_on(
    services: Services, users_database: Database, authority: Authority
) -> None:
    service = await start(services, users_database, authority)
    async with connect(service.address, ca=authority.ca) as channel:
        stub = Stub(channel)
        stream = stub.WatchUsers(Request(now={}))
        await read(stream)
        first = await asyncio.to_thread(shown, service.address)

        # A file that cannot be used changes nothing, and health says so.
        authority.key_of("server").write_text("")
        await service.wait_log("a changed file cannot be used; what was read before stays", name="certificate")
        assert await asyncio.to_thread(shown, service.address) == first
        assert await service.is_ready()

        certificate, _ = authority.issue("server")

        async def is_renewed() -> bool:
            return await asyncio.to_thread(shown, service.address) == certificate.read_text()

        await until(is_renewed)
        assert await refused_with(service.address, ca=authority.ca) is None
        made = await stub.CreateUser(create())
        while not (message := await read(stream)).events:
            pass
        assert message.events[0].user.id == made.id
        stream.cancel()


async def test_files_that_do_not_belong_together_are_refused_at_the_start(
    services: Services, tmp_path: Path, authority: Authority
) -> None:
    certificate, _ = authority.issue("one")
    _, key = authority.issue("other")
    process = services.users("postgresql://", tls_certificate_file=certificate, tls_key_file=key)
    await process.launch()
    assert await process.wait() == 2
    [line] = process.lines
    assert line.startswith(f"error: {certificate}, {key}: not a certificate chain and its key")
