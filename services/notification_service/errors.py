"""What can go wrong with a call, each with its stable reason."""

from __future__ import annotations

from servicekit.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError, Violation


def bad_token(field: str) -> InvalidArgumentError:
    """A token that this service did not make."""
    message = "is not a token of this service"
    return InvalidArgumentError(f"{field}: {message}", reason="BAD_TOKEN", violations=[Violation(field, message)])


def token_mismatch(field: str) -> InvalidArgumentError:
    """A token of a request that selected something else."""
    message = "is of a request with other filters"
    return InvalidArgumentError(f"{field}: {message}", reason="TOKEN_MISMATCH", violations=[Violation(field, message)])


def future_token(position: int, head: int) -> FailedPreconditionError:
    """The token is beyond the newest notification: this log was restored behind it."""
    return FailedPreconditionError(
        f"resume_token: position {position} is beyond the head {head}: start from earliest or now",
        reason="FUTURE_TOKEN",
        metadata={"position": str(position), "head_position": str(head)},
    )


def database_unavailable() -> UnavailableError:
    """The database cannot be reached."""
    return UnavailableError("the database is not available", reason="DATABASE_UNAVAILABLE", retry_after=1.0)
