"""The ceiling of a fan-out: bare grpc.aio on uvloop that sends prepared bytes to streams, nothing else.

python -m bench.prepared --streams 100 --messages 20 --batch 1000

Prints its address. It waits until as many streams are open as it was told, sends each the same messages, and ends
them; then the next may come. A message is a WatchUsersResponse of `batch` events as the service writes them, one object
that is sent again and again.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import uvloop

from bench import filling, serving
from tidings.users.v1 import users_pb2


async def serve(streams: int, messages: int, batch: int) -> None:
    """Serves until it is ended."""
    message = b"".join(filling.elements(1, batch))
    waiting = 0
    gate = asyncio.Event()

    async def watch(request: bytes, context: object) -> AsyncIterator[bytes]:
        nonlocal waiting, gate
        waiting += 1
        mine = gate
        yield b""  # the stream is open
        if waiting == streams:
            waiting, gate = 0, asyncio.Event()
            mine.set()
        await mine.wait()
        for _ in range(messages):
            yield message

    server = grpc.aio.server()
    service = users_pb2.DESCRIPTOR.services_by_name["UserService"].full_name
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "WatchUsers": grpc.unary_stream_rpc_method_handler(watch)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    await serving.serve(server)


def main() -> None:
    """Reads the arguments, serves."""
    parser = argparse.ArgumentParser()
    for name in ("streams", "messages", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    uvloop.run(serve(asked.streams, asked.messages, asked.batch))


if __name__ == "__main__":
    main()
