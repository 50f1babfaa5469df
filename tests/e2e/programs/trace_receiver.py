"""Takes spans by OTLP and writes a JSON line for each: its service, its trace, its name."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """The service of OTLP."""

    async def Export(self, request: Any, context: Any) -> Any:
        """Writes what it gets."""
        for sent in request.resource_spans:
            resource = {one.key: one.value.string_value for one in sent.resource.attributes}
            for scope in sent.scope_spans:
                for span in scope.spans:
                    line = {"service": resource.get("service.name"), "trace": span.trace_id.hex(), "name": span.name}
                    print(json.dumps(line), flush=True)
        return trace_service_pb2.ExportTraceServiceResponse()


async def main() -> None:
    """Serves until it is killed: it has nothing to lose."""
    server = grpc.aio.server()
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(Receiver(), server)
    server.add_insecure_port("0.0.0.0:4317")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
