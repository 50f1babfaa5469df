"""A request for a new user becomes an item for the writer: checked, with the id that the user will have."""

from __future__ import annotations

import hashlib

from uuid_utils import uuid7

from servicekit.errors import Violation
from tidings.users.v1 import users_pb2
from user_service import domain, validation
from user_service.domain import Item


def item(
    request: users_pb2.CreateUserRequest | users_pb2.ImportUsersRequest.Item,
    prefix: str,
    violations: validation.Violations,
) -> Item:
    """Adds to `violations` what is wrong with the request, whose fields begin with `prefix`. Changes the request's
    user to what is stored.
    """
    path = f"{prefix}user"
    if not request.HasField("user"):
        violations.append(Violation(path, "is required"))
    user = request.user
    validation.keep_caller_fields(user)
    labels = dict(user.labels)
    email_key = validation.check(user, labels, validation.CALLER_FIELDS, path, violations)
    request_id = validation.request_id(request.request_id, f"{prefix}request_id", violations)
    create = domain.create(user, labels, uuid7(), email_key, path)
    return Item(create, request_id, body_hash(create.given) if request_id else b"", f"{prefix}request_id")


def body_hash(body: bytes) -> bytes:
    """What tells whether a request_id comes with the same request again."""
    return hashlib.blake2b(body, digest_size=16).digest()
