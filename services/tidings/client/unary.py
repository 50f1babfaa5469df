"""What every unary call has: a deadline, and errors that say what is wrong."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any, Protocol, TypeVar

import grpc.aio

from tidings.client.errors import api_error

Response = TypeVar("Response")


class _Page(Protocol):
    next_page_token: str


Page = TypeVar("Page", bound=_Page)

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


async def pages(
    method: grpc.aio.UnaryUnaryMultiCallable[Any, Page], request: Any, timeout: float
) -> AsyncGenerator[Page, None]:
    """The pages of a list from the one that is asked for, each fetched when it is needed. Raises ApiError."""
    while True:
        page = await answer(method(request, timeout=timeout))
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def new_request_id() -> str:
    """A request_id that no other request has."""
    return str(uuid.uuid4())
