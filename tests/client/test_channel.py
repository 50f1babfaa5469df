"""What `connect` sends, to whom, and what it refuses to send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.harness import Authority
from tidings.client import connect
from tidings.client.channel import is_local


def _sent(context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    given = [(key, str(value)) for key, value in context.invocation_metadata() or ()]
    return " ".join(value for key, value in given if key in ("authorization", "mine")).encode()


async def _one(request: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return _sent(context)


async def _many(request: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    yield _sent(context)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A server whose methods, one of each kind, answer with the token that they were sent."""
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(_one),
        "unary_stream": grpc.unary_stream_rpc_method_handler(_many),
        "stream_unary": grpc.stream_unary_rpc_method_handler(_one),
        "stream_stream": grpc.stream_stream_rpc_method_handler(_many),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def sent(channel: grpc.aio.Channel, kind: str = "unary_unary", **options: Any) -> str:
    """What a call of a kind carries."""
    method = getattr(channel, kind)(f"/test/{kind}")
    call = method(iter([b""]) if kind.startswith("stream") else b"", **options)
    answer: bytes = await call.read() if kind.endswith("stream") else await call
    return answer.decode()


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_every_call_carries_the_token(address: str, kind: str) -> None:
    async with connect(address, token=" secret\n") as channel:
        assert await sent(channel, kind) == "Bearer secret"
        assert await sent(channel, kind, metadata=(("mine", "too"),)) == "too Bearer secret"
    async with connect(address) as channel:
        assert await sent(channel, kind) == ""


async def test_a_token_file_is_read_again_when_it_changes(address: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    async with connect(address, token_file=file) as channel:
        assert await sent(channel) == "Bearer first"
        (tmp_path / "other").write_text("second\n")
        (tmp_path / "other").replace(file)
        assert await sent(channel) == "Bearer second"
        # A file that holds no token, or none at all, changes nothing.
        file.write_text("")
        assert await sent(channel) == "Bearer second"
        file.unlink()
        assert await sent(channel) == "Bearer second"
        file.write_text("third")
        assert await sent(channel) == "Bearer third"


async def test_a_token_leaves_the_machine_only_encrypted(tmp_path: Path) -> None:
    remote = "192.0.2.1:50051"
    for target in (remote, f"dns:///{remote}", "users.example.com:443"):
        with pytest.raises(ValueError, match=f"the token would go to {target} in the clear"):
            connect(target, token="secret")
    for options in ({"tls": True}, {"ca": Authority(tmp_path).ca}, {"token_in_clear": True}):
        await connect(remote, token="secret", **options).close()
    await connect(remote).close()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path).issue("client")
    (junk := tmp_path / "junk").write_text("junk")
    _, other_key = Authority(tmp_path).issue("other")
    with pytest.raises(ValueError, match="not both"):
        connect("localhost:1", token="secret", token_file=key)
    for token in ("", " ", "two words", "new\nline", "ünïcode"):
        with pytest.raises(ValueError, match="not a token"):
            connect("localhost:1", token=token)
    with pytest.raises(ValueError, match=f"{certificate}: not a token"):
        connect("localhost:1", token_file=certificate)
    with pytest.raises(FileNotFoundError):
        connect("localhost:1", token_file=tmp_path / "missing")
    with pytest.raises(ValueError, match="go together"):
        connect("localhost:1", certificate=certificate)
    with pytest.raises(ValueError, match=f"{junk}: not certificates"):
        connect("localhost:1", ca=junk)
    with pytest.raises(ValueError, match=f"{certificate}, {other_key}: not a certificate chain and its key"):
        connect("localhost:1", certificate=certificate, key=other_key)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("dns:127.0.0.1:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:50051", True),
        ("unix:/run/tidings.sock", True),
        ("unix:///run/tidings.sock", True),
        ("unix-abstract:tidings", True),
        ("ipv4:127.0.0.1:1,192.0.2.1:2", False),
        ("dns://192.0.2.1/localhost:50051", False),
        ("dns:///users.example.com:50051", False),
        ("localhost.example.com:50051", False),
        ("0.0.0.0:50051", False),
        ("192.0.2.1:50051", False),
        ("xds:///localhost", False),
        ("", False),
    ],
)
def test_which_targets_stay_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


async def test_a_proxy_does_not_get_what_is_for_this_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(await reader.readline())
        writer.close()

    taken: list[bytes] = []
    proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{port}")
    async with connect(f"dns:///{address}", token="secret") as channel:
        assert await sent(channel) == "Bearer secret"
    assert taken == []
    # The variable does what it should: without the option the proxy is asked.
    async with grpc.aio.insecure_channel(f"dns:///{address}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await sent(channel)
    assert taken
    proxy.close()
