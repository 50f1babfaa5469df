"""Opaque tokens: where a stream stands and which history it has seen, and where a list goes on.

A resume token is bound to its log, to the event at its position and to what the stream selects, so that after a restore
or a failover a cursor is refused instead of skipping silently.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
import uuid
from dataclasses import dataclass

from user_service import errors

_FORMAT = 1
_LAYOUT = struct.Struct("!B16sQ8s8s")
_START = bytes(8)  # stands for the event before the first

# What a stream without filter and shard selects.
EVERYTHING = bytes(8)


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """A position of a log, with the hash of the event there and of the stream's selection."""

    log_id: uuid.UUID
    position: int
    event_hash: bytes
    selection: bytes = EVERYTHING


def event_hash(event_id: bytes | None) -> bytes:
    """The 8 bytes that stand for an event in a token; None is the position before the first event."""
    return _START if event_id is None else hashlib.sha256(event_id).digest()[:8]


def encode(token: ResumeToken) -> str:
    """The text of a token."""
    raw = _LAYOUT.pack(_FORMAT, token.log_id.bytes, token.position, token.event_hash, token.selection)
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(text: str) -> ResumeToken:
    """Reads a token. Raises BAD_TOKEN if it is none."""
    raw = _raw(text, "resume_token")
    if len(raw) != _LAYOUT.size or raw[0] != _FORMAT:
        raise errors.bad_token("resume_token")
    _, log_id, position, seen, selection = _LAYOUT.unpack(raw)
    return ResumeToken(uuid.UUID(bytes=log_id), position, seen, selection)


def _raw(text: str, field: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise errors.bad_token(field) from None


def encode_page(last: uuid.UUID, selection: bytes) -> str:
    """The token of the page after the user `last`, for a list with this selection."""
    return base64.urlsafe_b64encode(bytes([_FORMAT]) + last.bytes + selection).rstrip(b"=").decode()


def decode_page(text: str, selection: bytes) -> uuid.UUID:
    """The last user of the page before. Raises BAD_TOKEN, or TOKEN_MISMATCH if the list selects something else."""
    raw = _raw(text, "page_token")
    if len(raw) != 25 or raw[0] != _FORMAT:
        raise errors.bad_token("page_token")
    if raw[17:] != selection:
        raise errors.token_mismatch("page_token")
    return uuid.UUID(bytes=raw[1:17])


def selection_hash(*parts: str) -> bytes:
    """8 bytes that stand for what a request selects."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(struct.pack("!I", len(raw)) + raw)
    return digest.digest()[:8]
