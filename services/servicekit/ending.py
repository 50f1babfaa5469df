"""The status that a call ends with: one derivation, for metrics and spans alike."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from servicekit.callers import Call
from servicekit.errors import ServiceError

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_CLOSE = 0.05  # seconds before a deadline


def code_of(error: BaseException, call: Call | grpc.aio.ServicerContext[Any, Any]) -> str:
    """The name of the status of a call that an error ended."""
    if isinstance(error, ServiceError):
        return error.code
    if isinstance(error, grpc.aio.BaseError):
        return _CODES.get(call.code(), "UNKNOWN")  # type: ignore[arg-type] # a number, or a code
    if isinstance(error, Exception):
        return "INTERNAL"
    # The caller has gone, or its time is over, which it may have noticed before.
    left = call.time_remaining()
    return "CANCELLED" if left is None or left > _CLOSE else "DEADLINE_EXCEEDED"
