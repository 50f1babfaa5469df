"""Opaque tokens: where a stream stands and which history it has seen, and where a list goes on.

A resume token is bound to its log, to the event at its position and to what the stream selects, so that after a restore
or a failover a cursor is refused instead of skipping silently. One made inside a snapshot has another format: it also
names the snapshot and the last user that was passed.
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
_SNAPSHOT_FORMAT = 2
_LAYOUT = struct.Struct("!B16sQ8s8s")
_ID_SIZE = 16
_START = bytes(8)  # stands for the event before the first

# What a stream without filter and shard selects.
EVERYTHING = bytes(8)


@dataclass(frozen=True, slots=True)
class InSnapshot:
    """An open snapshot, and the id of the last user that was passed: empty before the first."""

    id: uuid.UUID
    last: bytes = b""


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """A position of a log, with the hash of the event there and of the stream's selection; inside a snapshot at that
    position also how far it is.
    """

    log_id: uuid.UUID
    position: int
    event_hash: bytes
    selection: bytes = EVERYTHING
    snapshot: InSnapshot | None = None


def event_hash(event_id: bytes | None) -> bytes:
    """The 8 bytes that stand for an event in a token; None is the position before the first event."""
    return _START if event_id is None else hashlib.sha256(event_id).digest()[:8]


def encode(token: ResumeToken) -> str:
    """The text of a token."""
    kind, rest = _FORMAT, b""
    if token.snapshot is not None:
        kind, rest = _SNAPSHOT_FORMAT, token.snapshot.id.bytes + token.snapshot.last
    raw = _LAYOUT.pack(kind, token.log_id.bytes, token.position, token.event_hash, token.selection) + rest
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(text: str) -> ResumeToken:
    """Reads a token. Raises BAD_TOKEN if it is none."""
    raw = _raw(text, "resume_token")
    head, rest = raw[: _LAYOUT.size], raw[_LAYOUT.size :]
    # What follows the head, by format: nothing; or a snapshot's id, with or without a user's.
    sizes = {_FORMAT: (0,), _SNAPSHOT_FORMAT: (_ID_SIZE, 2 * _ID_SIZE)}
    if len(head) != _LAYOUT.size or len(rest) not in sizes.get(raw[0], ()):
        raise errors.bad_token("resume_token")
    _, log_id, position, seen, selection = _LAYOUT.unpack(head)
    snapshot = InSnapshot(uuid.UUID(bytes=rest[:_ID_SIZE]), rest[_ID_SIZE:]) if rest else None
    return ResumeToken(uuid.UUID(bytes=log_id), position, seen, selection, snapshot)


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
