"""Takes what is exported by OTLP and throws it away unread: what exporting costs is the sender's alone."""

from __future__ import annotations

import grpc
import grpc.aio
import uvloop

from bench import serving


async def _take(request: bytes, context: object) -> bytes:
    return b""


class _All(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(_take)


async def serve() -> None:
    """Prints its address, then serves until it is ended."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((_All(),))
    await serving.serve(server)


if __name__ == "__main__":
    uvloop.run(serve())
