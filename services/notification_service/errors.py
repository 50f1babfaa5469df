"""What can go wrong with a call, each with its stable reason."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from servicekit.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    Violation,
)

# A status travels in headers, which are bounded: it names so many deliveries and counts the others.
_MOST_NAMED = 10


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


def _named(words: Sequence[str]) -> str:
    more = len(words) - _MOST_NAMED
    return ", ".join(words[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _ids(ids: Sequence[uuid.UUID]) -> Mapping[str, str]:
    return {"ids": ",".join(str(one) for one in ids[:_MOST_NAMED])}


def unknown_delivery(ids: Sequence[uuid.UUID]) -> NotFoundError:
    """Deliveries that do not exist."""
    return NotFoundError(
        f"no such delivery: {_named([str(one) for one in ids])}", reason="UNKNOWN_DELIVERY", metadata=_ids(ids)
    )


def not_parked(states: Mapping[uuid.UUID, str]) -> FailedPreconditionError:
    """Deliveries that are not parked, with their states."""
    words = [f"{one} is {state}" for one, state in states.items()]
    return FailedPreconditionError(f"not parked: {_named(words)}", reason="NOT_PARKED", metadata=_ids(list(states)))


def nothing_to_send(ids: Sequence[uuid.UUID]) -> FailedPreconditionError:
    """Deliveries that could not be composed; they can only be discarded."""
    return FailedPreconditionError(
        f"nothing to send, their attempt says why: {_named([str(one) for one in ids])}",
        reason="NOTHING_TO_SEND",
        metadata=_ids(ids),
    )


def stale_version(user_id: uuid.UUID, asked: int, current: int) -> AbortedError:
    """The caller's version of a user's preferences is not the current one."""
    return AbortedError(
        f"preferences.version: is {asked}, but the current version of user {user_id}'s preferences is {current}",
        reason="STALE_VERSION",
        metadata={"user_id": str(user_id), "version": str(asked), "current_version": str(current)},
    )


def suppressed(channel: str, target: str, reason: str) -> AlreadyExistsError:
    """An address that is suppressed, with the reason."""
    return AlreadyExistsError(
        f"{target} is suppressed: {reason}",
        reason="SUPPRESSED",
        metadata={"channel": channel, "target": target, "reason": reason},
    )


def not_suppressed(channel: str, target: str) -> NotFoundError:
    """An address that is not suppressed."""
    return NotFoundError(
        f"{target} is not suppressed", reason="NOT_SUPPRESSED", metadata={"channel": channel, "target": target}
    )


def database_unavailable() -> UnavailableError:
    """The database cannot be reached."""
    return UnavailableError("the database is not available", reason="DATABASE_UNAVAILABLE", retry_after=1.0)
