"""What can go wrong, as types. gRPC's own error is read in one place, `api_error`, and never reaches a caller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class TidingsError(Exception):
    """The root of this package's errors."""


class Violation(NamedTuple):
    """One invalid field of a request: its path as a caller writes it (`user.email`) and what is wrong with it."""

    field: str
    description: str


class ApiError(TidingsError):
    """A call was refused or could not be made.

    `reason` is stable and meant for programs (`EMAIL_TAKEN`); it is the code's name if the server gave none, for
    instance because it could not be reached. `retry_after` is in seconds.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: Iterable[Violation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message or code.name)
        self.code = code
        self.message = message or code.name
        self.reason = reason or code.name
        self.metadata = metadata or {}
        self.violations = tuple(violations)
        self.retry_after = retry_after

    @property
    def is_temporary(self) -> bool:
        """Whether the same call, with the same request_id, may succeed later."""
        return self.code in _TEMPORARY or (
            self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_after is not None
        )


# CANCELLED by the other side is how a server that ran out of its grace ends a call.
_TEMPORARY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


class FeedError(TidingsError):
    """A feed cannot go on, and reconnecting would not help."""


class GapError(FeedError):
    """Positions do not follow each other: between two messages, or two events, something is missing or repeated."""

    def __init__(self, what: str, expected: int, got: int) -> None:
        super().__init__(f"{what} is {got}, expected {expected}")
        self.expected = expected
        self.got = got


class ProtocolError(FeedError):
    """The server does not speak the feed's protocol."""


class FeedRefusedError(FeedError):
    """The server refuses the stream; `error` says why."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class LostPlaceError(FeedRefusedError):
    """The feed cannot go on where it was: a copy must be built anew, from a snapshot."""


class PositionExpiredError(LostPlaceError):
    """What would come next is no longer retained."""

    @property
    def earliest_position(self) -> int | None:
        """The first position that is still retained."""
        text = self.error.metadata.get("earliest_position", "")
        return int(text) if text.isdecimal() else None


class ForeignTokenError(LostPlaceError):
    """The token is of another log."""


class DivergedTokenError(LostPlaceError):
    """The token is of this log but of another history: the log was restored or failed over behind it."""


class FutureTokenError(LostPlaceError):
    """The token is beyond the head of the log."""


class BadTokenError(FeedRefusedError):
    """The token is malformed."""


class TokenMismatchError(FeedRefusedError):
    """The token is of a stream with another filter or shard."""


_BY_REASON: dict[str, type[FeedRefusedError]] = {
    "POSITION_EXPIRED": PositionExpiredError,
    "FOREIGN_TOKEN": ForeignTokenError,
    "DIVERGED_TOKEN": DivergedTokenError,
    "FUTURE_TOKEN": FutureTokenError,
    "BAD_TOKEN": BadTokenError,
    "TOKEN_MISMATCH": TokenMismatchError,
}

# Codes that say something about the request. Everything else is about the server or the way to it, and passes.
_LASTING = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


def api_error(error: grpc.aio.AioRpcError) -> ApiError:
    """What a gRPC error says, its google.rpc details included."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # it reads what both kinds of call have
    except (ValueError, DecodeError):  # details that do not belong to the status, as some proxies make them
        status = None
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_after = None
    for detail in status.details if status else ():
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return ApiError(
        error.code(),
        error.details() or "",
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=(Violation(violation.field, violation.description) for violation in bad.field_violations),
        retry_after=retry_after,
    )


def feed_refusal(error: ApiError) -> FeedRefusedError | None:
    """What ends a feed for good; None if reconnecting may help."""
    if error.code not in _LASTING:
        return None
    return _BY_REASON.get(error.reason, FeedRefusedError)(error)
