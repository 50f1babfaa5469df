"""What a webhook endpoint is to those who compose for it and who call it, wherever it was described; and what a URL and
a secret must look like.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from functools import cached_property

from standardwebhooks import Webhook
from yarl import URL

from notification_service import egress
from tidings.notifications.v1 import endpoints_pb2

LONGEST_URL = 2048
BAD_SECRET = "a secret is whsec_ and the base64 of 24 to 64 bytes"  # noqa: S105 - says what one is

TARGET_PREFIX = "endpoints/"
_NEW_SECRET_BYTES = 32
# Blanks and control characters are dropped or encoded by parsers, each in its own way.
_NOT_IN_URLS = re.compile(r"[\x00-\x20\x7f-\xa0\\]")
# The ids of endpoints of the operator's file are made of their names.
_FILE_NAMESPACE = uuid.UUID("0fd8a5a2-7c1e-4f0f-9b57-6a7b8f2a3a10")


class State(IntEnum):
    """Endpoint.State, as stored."""

    ENABLED = endpoints_pb2.Endpoint.ENABLED
    DISABLED = endpoints_pb2.Endpoint.DISABLED


@dataclass(frozen=True)
class Secret:
    """A secret that signs until `expire_time`, or without an end. It is in no repr."""

    text: str = field(repr=False)
    create_time: datetime | None = None
    expire_time: datetime | None = None

    @cached_property
    def signer(self) -> Webhook:
        """What signs with it; made once, when it is first needed."""
        return Webhook(self.text)


@dataclass(frozen=True, slots=True)
class Destination:
    """An endpoint. `position` orders lists; None tells one of the operator's file. Empty `events` and `categories` are
    all of them; `rate_limit` is in calls per second, 0 for none.
    """

    id: uuid.UUID
    name: str
    url: str
    target: str
    secrets: tuple[Secret, ...]
    events: frozenset[str] = frozenset()
    categories: frozenset[str] = frozenset()
    description: str = ""
    state: State = State.ENABLED
    disable_reason: str = ""
    disable_time: datetime | None = None
    rate_limit: float = 0.0
    create_time: datetime | None = None
    update_time: datetime | None = None
    version: int = 0
    position: int | None = None

    def wants(self, event_type: str, category: str) -> bool:
        """Whether notifications of this kind go here."""
        return (not self.events or event_type in self.events) and (not self.categories or category in self.categories)

    def signers(self, now: datetime) -> tuple[Webhook, ...]:
        """One signer per secret that is valid."""
        return tuple(one.signer for one in self.secrets if one.expire_time is None or now < one.expire_time)


def target_of(identity: uuid.UUID) -> str:
    """Delivery.target of an endpoint made by the API."""
    return f"{TARGET_PREFIX}{identity}"


def id_in(target: str) -> uuid.UUID | None:
    """The id in such a target, None in others."""
    if not target.startswith(TARGET_PREFIX):
        return None
    try:
        return uuid.UUID(target.removeprefix(TARGET_PREFIX))
    except ValueError:
        return None


def id_of_file(name: str) -> uuid.UUID:
    """The id of an endpoint of the operator's file."""
    return uuid.uuid5(_FILE_NAMESPACE, name)


def new_secret() -> str:
    """A secret that nobody else has."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_NEW_SECRET_BYTES)).decode()


def is_secret(text: str) -> bool:
    """Whether a text is a secret of Standard Webhooks."""
    if not text.startswith("whsec_"):
        return False
    try:
        return 24 <= len(base64.b64decode(text.removeprefix("whsec_"), validate=True)) <= 64
    except binascii.Error:
        return False


def wrong_with_url(text: str, allowed: Sequence[egress.Network]) -> str | None:
    """What is wrong with the URL of an endpoint, if anything. Names are not resolved; each call does."""
    if not text:
        return "is required"
    if len(text) > LONGEST_URL:
        return f"must be at most {LONGEST_URL} characters"
    if _NOT_IN_URLS.search(text):
        return "must not hold blanks, control characters or backslashes"
    try:
        url = URL(text)
        host = url.host
    except ValueError as error:
        return f"is no URL: {error}"
    if url.scheme not in ("http", "https") or not host:
        return "must be an http or https URL with a host"
    if url.raw_user is not None or url.raw_password is not None:
        return "must not hold credentials"
    if "#" in text:
        return "must not have a fragment"
    return _wrong_with_host(host, allowed)


def _wrong_with_host(host: str, allowed: Sequence[egress.Network]) -> str | None:
    address = host
    if ":" not in host:
        try:
            # The system's resolver takes other spellings of IPv4 addresses, too: 0x7f.1, 2130706433.
            address = socket.inet_ntoa(socket.inet_aton(host))
        except OSError:
            return None
    try:
        egress.check(address, allowed)
    except egress.ForbiddenAddressError as error:
        return f"{error}; TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS allows others"
    return None
