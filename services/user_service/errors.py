"""What can go wrong with a user or a stream, each with its stable reason. The docstrings are for readers of the
code.
"""

from __future__ import annotations

from datetime import datetime

from servicekit.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
    Violation,
)


def user_not_found(user_id: str, path: str) -> NotFoundError:
    """No such user, or one that is soft-deleted and may not be changed, or one that is purged."""
    return NotFoundError(f"{path}: no user {user_id}", reason="USER_NOT_FOUND", metadata={"field": path, "id": user_id})


def name_taken(field: str, path: str, value: str) -> AlreadyExistsError:
    """A living user has this username or email."""
    return AlreadyExistsError(
        f"{path}: {value} is taken",
        reason=f"{field.upper()}_TAKEN",
        metadata={"field": path, "value": value},
    )


def not_deleted(user_id: str) -> FailedPreconditionError:
    """UndeleteUser of a living user."""
    return FailedPreconditionError(
        f"id: user {user_id} is not deleted", reason="USER_NOT_DELETED", metadata={"id": user_id}
    )


def stale_version(user_id: str, asked: int, current: int) -> AbortedError:
    """The caller's version is not the current one."""
    return AbortedError(
        f"version: is {asked}, but the current version of user {user_id} is {current}",
        reason="STALE_VERSION",
        metadata={"id": user_id, "version": str(asked), "current_version": str(current)},
    )


def request_id_reused(path: str, request_id: str) -> InvalidArgumentError:
    """The request_id was used for another request."""
    message = "was used for a different request"
    return InvalidArgumentError(
        f"{path}: {request_id} {message}",
        reason="REQUEST_ID_REUSED",
        metadata={"request_id": request_id},
        violations=[Violation(path, message)],
    )


def outcome_unknown() -> UnavailableError:
    """The connection broke while COMMIT was on its way and the outcome could not be learnt in time."""
    return UnavailableError(
        "the outcome of the change is not known; retry with the same request_id",
        reason="OUTCOME_UNKNOWN",
        retry_after=1.0,
    )


def database_unavailable() -> UnavailableError:
    """The database cannot be reached; nothing was changed."""
    return UnavailableError("the database is not available", reason="DATABASE_UNAVAILABLE", retry_after=1.0)


def shutting_down() -> UnavailableError:
    """This replica is going away."""
    return UnavailableError("the server is shutting down", reason="SHUTTING_DOWN", retry_after=0.1)


def queue_full() -> ResourceExhaustedError:
    """More changes wait for their commit than this replica allows."""
    return ResourceExhaustedError("too many changes are waiting", reason="WRITE_QUEUE_FULL", retry_after=1.0)


def caller_queue_full(caller: str, limit: int) -> ResourceExhaustedError:
    """More changes of this caller wait for their commit than this replica allows to one."""
    return ResourceExhaustedError(
        f"too many changes of caller {caller} are waiting",
        reason="WRITE_QUEUE_FULL",
        metadata={"limit": str(limit), "caller": caller},
        retry_after=1.0,
    )


def position_expired(position: int, earliest: int) -> OutOfRangeError:
    """The stream would begin before what is retained."""
    return OutOfRangeError(
        f"position {position} is no longer retained, the earliest is {earliest}: take a snapshot",
        reason="POSITION_EXPIRED",
        metadata={"position": str(position), "earliest_position": str(earliest), "advice": "start with snapshot"},
    )


def time_expired(time: datetime, earliest: int) -> OutOfRangeError:
    """The stream would begin at a time before what is retained."""
    return OutOfRangeError(
        f"since: what was committed at {time.isoformat()} is no longer retained, the earliest position is {earliest}: "
        "take a snapshot",
        reason="POSITION_EXPIRED",
        metadata={"earliest_position": str(earliest), "advice": "start with snapshot"},
    )


def foreign_token() -> FailedPreconditionError:
    """The token is of another log."""
    return FailedPreconditionError(
        "resume_token: is of another log: take a snapshot",
        reason="FOREIGN_TOKEN",
        metadata={"advice": "start with snapshot"},
    )


def diverged_token(position: int) -> FailedPreconditionError:
    """The token is of this log but of another history: the log was restored or failed over behind it."""
    return FailedPreconditionError(
        f"resume_token: the event at position {position} is another one now: take a snapshot",
        reason="DIVERGED_TOKEN",
        metadata={"position": str(position), "advice": "start with snapshot"},
    )


def future_token(position: int, head: int) -> FailedPreconditionError:
    """The token is beyond the head of the primary itself."""
    return FailedPreconditionError(
        f"resume_token: position {position} is beyond the head {head}: take a snapshot",
        reason="FUTURE_TOKEN",
        metadata={"position": str(position), "head_position": str(head), "advice": "start with snapshot"},
    )


def replica_behind(position: int, head: int) -> UnavailableError:
    """The token is beyond what this replica has seen."""
    return UnavailableError(
        f"this replica is at position {head} and has not seen {position} yet", reason="REPLICA_BEHIND", retry_after=1.0
    )


def bad_token(field: str) -> InvalidArgumentError:
    """A token that this service did not make."""
    message = "is not a token of this service"
    return InvalidArgumentError(f"{field}: {message}", reason="BAD_TOKEN", violations=[Violation(field, message)])


def token_mismatch(field: str) -> InvalidArgumentError:
    """A token of a request that selected something else."""
    message = "is of a request that selects something else"
    return InvalidArgumentError(f"{field}: {message}", reason="TOKEN_MISMATCH", violations=[Violation(field, message)])
