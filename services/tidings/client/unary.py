"""What every unary call has: a deadline, and errors that say what is wrong."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

import grpc.aio

from tidings.client.errors import api_error

Response = TypeVar("Response")

# Seconds that a call may take, retries included.
TIMEOUT = 10.0

# What a list asks for at a time.
PAGE_SIZE = 1000


async def answer(call: grpc.aio.UnaryUnaryCall[Any, Response]) -> Response:
    """The answer of a call. Raises ApiError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise api_error(error) from error


def new_request_id() -> str:
    """A request_id that no other request has."""
    return str(uuid.uuid4())
