"""Errors a caller is meant to see.

Anything below the API raises a `ServiceError`; one place (`servicekit.guard`) turns it into a gRPC status with
google.rpc details. This module knows no gRPC, so that business code can raise without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

DOMAIN = "tidings"


@dataclass(frozen=True, slots=True)
class Violation:
    """One invalid field of a request: its path as a caller writes it (`user.email`) and what is wrong with it."""

    field: str
    description: str


class ServiceError(Exception):
    """The root of all errors that reach a caller.

    `code` is the name of the gRPC status code; `reason` and `metadata` become ErrorInfo, `violations` become
    BadRequest, `retry_after` (seconds) becomes RetryInfo.
    """

    code: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after


class InvalidArgumentError(ServiceError):
    """The request can never succeed as it is."""

    code = "INVALID_ARGUMENT"


class UnauthenticatedError(ServiceError):
    """Who calls is not known."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ServiceError):
    """Who calls is known and may not do this."""

    code = "PERMISSION_DENIED"


class NotFoundError(ServiceError):
    """What the request names does not exist."""

    code = "NOT_FOUND"


class AlreadyExistsError(ServiceError):
    """What the request wants to create, or a name it wants to take, exists."""

    code = "ALREADY_EXISTS"


class AbortedError(ServiceError):
    """The caller's view is stale: read again, then retry."""

    code = "ABORTED"


class FailedPreconditionError(ServiceError):
    """The system is not in the state that the request needs."""

    code = "FAILED_PRECONDITION"


class OutOfRangeError(ServiceError):
    """The request reads past an edge."""

    code = "OUT_OF_RANGE"


class ResourceExhaustedError(ServiceError):
    """A limit is reached."""

    code = "RESOURCE_EXHAUSTED"


class UnimplementedError(ServiceError):
    """The request asks for something that this release does not do."""

    code = "UNIMPLEMENTED"


class UnavailableError(ServiceError):
    """Nothing is known to be wrong with the request: retry it with its request_id."""

    code = "UNAVAILABLE"


def invalid(*violations: Violation) -> InvalidArgumentError:
    """An INVALID_ARGUMENT that names every invalid field."""
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return InvalidArgumentError(message, reason="INVALID_FIELD", violations=violations)
