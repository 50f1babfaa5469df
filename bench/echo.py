"""The floor: bare grpc.aio on uvloop in a process of its own, no interceptors, the messages of CreateUser."""

from __future__ import annotations

import grpc
import grpc.aio
import uvloop

from bench import serving
from tidings.users.v1 import users_pb2


async def echo(request: users_pb2.CreateUserRequest, context: object) -> users_pb2.User:
    """Nothing but the RPC."""
    return request.user


async def serve() -> None:
    """Prints its address, then serves until it is ended."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        echo, users_pb2.CreateUserRequest.FromString, users_pb2.User.SerializeToString
    )
    service = users_pb2.DESCRIPTOR.services_by_name["UserService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"CreateUser": handler}),))
    await serving.serve(server)


if __name__ == "__main__":
    uvloop.run(serve())
