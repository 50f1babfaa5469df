"""Creates a user as part of a trace, whose id it prints."""

from __future__ import annotations

import asyncio
import os
import secrets

from tidings.client import User, connect
from tidings.users.v1 import users_pb2, users_pb2_grpc


async def main() -> None:
    """One call."""
    trace = secrets.token_hex(16)
    name = f"traced-{trace[:8]}"
    request = users_pb2.CreateUserRequest(user=User(username=name, email=f"{name}@example.com"))
    async with connect(
        os.environ["TIDINGS_CLIENT_USERS_ADDRESS"],
        token_file=os.environ["TIDINGS_CLIENT_TOKEN_FILE"],
        ca=os.environ["TIDINGS_CLIENT_CA_FILE"],
    ) as channel:
        parent = f"00-{trace}-{secrets.token_hex(8)}-01"
        stub = users_pb2_grpc.UserServiceStub(channel)
        await stub.CreateUser(request, metadata=(("traceparent", parent),), timeout=30)
    print(trace)


if __name__ == "__main__":
    asyncio.run(main())
