"""What every server that a benchmark starts as a process of its own does at its end: says where it is, and serves."""

from __future__ import annotations

import asyncio
import sys

import grpc.aio


async def serve(server: grpc.aio.Server) -> None:
    """Prints the server's address, then serves until the process is ended."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()
