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
    ResourceExhaustedError,
    UnavailableError,
    Violation,
    invalid,
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


def foreign_token() -> FailedPreconditionError:
    """The token is of another log of notifications."""
    return FailedPreconditionError(
        "resume_token: is of another log: start from earliest or now", reason="FOREIGN_TOKEN"
    )


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


def unknown_subject(field: str, identity: uuid.UUID, user_id: str) -> NotFoundError:
    """Nothing of this user has this id."""
    of = f" of user {user_id}" if user_id else ""
    return NotFoundError(
        f"{field}: no such notification{of}: {identity}",
        reason="UNKNOWN_NOTIFICATION",
        metadata={"field": field, "id": str(identity)},
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


def unknown_notification(ids: Sequence[uuid.UUID]) -> NotFoundError:
    """What is no in-app notification of this user: of another user, of other channels, or not there at all."""
    return NotFoundError(
        f"no such in-app notification of this user: {_named([str(one) for one in ids])}",
        reason="UNKNOWN_NOTIFICATION",
        metadata=_ids(ids),
    )


def beyond_head(position: int, head: int) -> InvalidArgumentError:
    """A position that nobody can have seen, for the log is not that long."""
    return invalid(Violation("up_to_position", f"is {position}, beyond the head {head}"))


def unknown_endpoint(identity: str) -> NotFoundError:
    """An endpoint that does not exist."""
    return NotFoundError(
        f"id: no endpoint {identity}", reason="UNKNOWN_ENDPOINT", metadata={"field": "id", "id": identity}
    )


def name_taken(name: str) -> AlreadyExistsError:
    """Another endpoint, of the operator's file perhaps, has this name."""
    path = "endpoint.name"
    return AlreadyExistsError(f"{path}: {name} is taken", reason="NAME_TAKEN", metadata={"field": path, "value": name})


def stale_version(identity: str, asked: int, current: int) -> AbortedError:
    """The caller's version is not the current one."""
    return AbortedError(
        f"version: is {asked}, but the current version of endpoint {identity} is {current}",
        reason="STALE_VERSION",
        metadata={"id": identity, "version": str(asked), "current_version": str(current)},
    )


def request_id_reused(request_id: str) -> InvalidArgumentError:
    """The request_id was used for another request, or by another caller."""
    message = "was used for a different request"
    return InvalidArgumentError(
        f"request_id: {request_id} {message}",
        reason="REQUEST_ID_REUSED",
        metadata={"request_id": request_id},
        violations=[Violation("request_id", message)],
    )


def endpoint_of_file(name: str) -> FailedPreconditionError:
    """A change of an endpoint that the operator's file describes."""
    return FailedPreconditionError(
        f"id: endpoint {name} is of the operator's file: change it there",
        reason="ENDPOINT_OF_FILE",
        metadata={"field": "id", "name": name},
    )


def too_many_endpoints(limit: int) -> ResourceExhaustedError:
    """There are as many endpoints as may be."""
    return ResourceExhaustedError(
        f"there are {limit} endpoints, which is the most", reason="TOO_MANY_ENDPOINTS", metadata={"limit": str(limit)}
    )


def too_many_secrets(limit: int) -> FailedPreconditionError:
    """As many secrets of an endpoint sign as may."""
    return FailedPreconditionError(
        f"{limit} secrets sign already, which is the most: wait until some expire, or rotate with an overlap of 0",
        reason="TOO_MANY_SECRETS",
        metadata={"limit": str(limit)},
    )


def unknown_template(name: str) -> NotFoundError:
    """No template has this name."""
    return NotFoundError(f"no such template: {name[:63]}", reason="UNKNOWN_TEMPLATE")


def template_failed(problem: str) -> FailedPreconditionError:
    """A template cannot be rendered for a sample."""
    return FailedPreconditionError(problem, reason="TEMPLATE_FAILED")


def templates_refused(problems: str) -> FailedPreconditionError:
    """The files lack what the rules need; a line per problem."""
    lines = problems.splitlines()
    more = f"\nand {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
    return FailedPreconditionError("\n".join(lines[:_MOST_NAMED]) + more, reason="TEMPLATES_REFUSED")


def stale_preferences(user_id: uuid.UUID, asked: int, current: int) -> AbortedError:
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


def unknown_send(identity: str, field: str = "id") -> NotFoundError:
    """A send that does not exist."""
    return NotFoundError(
        f"{field}: no send {identity}", reason="UNKNOWN_SEND", metadata={"field": field, "id": identity}
    )


def unknown_digest(identity: str) -> NotFoundError:
    """A digest that does not exist."""
    return NotFoundError(f"id: no digest {identity}", reason="UNKNOWN_DIGEST", metadata={"field": "id", "id": identity})


def digest_cancelled(identity: str, reason: str) -> FailedPreconditionError:
    """A digest that becomes nothing any more, with the reason."""
    return FailedPreconditionError(
        f"id: digest {identity} is cancelled: {reason}",
        reason="DIGEST_CANCELLED",
        metadata={"id": identity, "reason": reason},
    )


def database_unavailable() -> UnavailableError:
    """The database cannot be reached."""
    return UnavailableError("the database is not available", reason="DATABASE_UNAVAILABLE", retry_after=1.0)
