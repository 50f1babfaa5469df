"""Probes asked as a kubelet asks them: gRPC health without TLS, HTTP, TCP, a command inside the container."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.containers.docker import Docker, DockerError


async def ask(
    probe: Mapping[str, Any], ports: Mapping[str, int], docker: Docker, container: str, address: str
) -> str | None:
    """None, or why the probe fails. `ports` are the container's by name."""
    timeout = float(probe.get("timeoutSeconds", 1))
    try:
        async with asyncio.timeout(timeout):
            if "grpc" in probe:
                return await ask_grpc(f"{address}:{probe['grpc']['port']}", probe["grpc"].get("service", ""), timeout)
            if "httpGet" in probe:
                port = probe["httpGet"]["port"]
                return await ask_http(address, ports.get(port, port), probe["httpGet"]["path"])
            if "tcpSocket" in probe:
                port = probe["tcpSocket"]["port"]
                _, writer = await asyncio.open_connection(address, ports.get(port, port))
                writer.close()
                return None
            code, output = await docker.run("exec", container, *probe["exec"]["command"])
            return None if code == 0 else f"exit code {code}: {output.strip()}"
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except (OSError, DockerError) as error:
        return str(error)


async def ask_http(address: str, port: int, path: str) -> str | None:
    """None if the answer is a success, or the line that it begins with."""
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        line = (await reader.readline()).decode(errors="replace").strip()
    finally:
        writer.close()
    return None if line.split()[1:2] and 200 <= int(line.split()[1]) < 400 else f"answered {line!r}"


async def ask_grpc(target: str, service: str, timeout: float) -> str | None:
    """None if a service of a health server is SERVING, or what it is."""
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
