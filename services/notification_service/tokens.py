"""Opaque tokens: where a list goes on and where a stream resumes, bound to what the request selects.

A token of a stream is bound to its log, too, so that another database's is refused instead of skipping silently.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
import uuid
from dataclasses import dataclass
from typing import Any

from notification_service import errors

_FORMAT = 1
_LAYOUT = struct.Struct("!BcQ8s")

# With the log. Streams of the release before made tokens of the first format; they are still good.
_LOG_FORMAT = 2
_LOG_LAYOUT = struct.Struct("!Bc16sQ8s")

# The byte that tells a token's kind.
_PAGE, _RESUME = b"p", b"r"

# Positions are stored as signed numbers.
_POSITIONS = 1 << 63


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """A position of a log. The log is None in a token that does not say it."""

    log_id: uuid.UUID | None
    position: int


# Before a key of two texts, which a NUL parts.
_KEY_HEAD = struct.Struct("!Bc8s")
_KEY_KIND = b"k"


def selection_hash(*parts: str) -> bytes:
    """8 bytes that stand for what a request selects."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(struct.pack("!I", len(raw)) + raw)
    return digest.digest()[:8]


def encode_page(position: int, selection: bytes) -> str:
    """The token of the page after a position."""
    return _text(_LAYOUT.pack(_FORMAT, _PAGE, position, selection))


def decode_page(text: str, selection: bytes) -> int:
    """The position in a page's token. Raises BAD_TOKEN, or TOKEN_MISMATCH if it is of another selection."""
    return _checked("page_token", _PAGE, _unpacked("page_token", _LAYOUT, _FORMAT, _raw("page_token", text)), selection)


def encode_resume(log_id: uuid.UUID, position: int, selection: bytes) -> str:
    """The token to resume a stream with after a position."""
    return _text(_LOG_LAYOUT.pack(_LOG_FORMAT, _RESUME, log_id.bytes, position, selection))


def decode_resume(text: str, selection: bytes) -> ResumeToken:
    """Where a stream resumes. Raises BAD_TOKEN, or TOKEN_MISMATCH if it is of another selection."""
    field = "resume_token"
    raw = _raw(field, text)
    if raw[:1] == bytes([_FORMAT]):
        return ResumeToken(None, _checked(field, _RESUME, _unpacked(field, _LAYOUT, _FORMAT, raw), selection))
    kind, log_id, *rest = _unpacked(field, _LOG_LAYOUT, _LOG_FORMAT, raw)
    return ResumeToken(uuid.UUID(bytes=log_id), _checked(field, _RESUME, (kind, *rest), selection))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(field: str, text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise errors.bad_token(field) from None


def _unpacked(field: str, layout: struct.Struct, version: int, raw: bytes) -> tuple[Any, ...]:
    """What follows the format in a token."""
    if len(raw) != layout.size or raw[0] != version:
        raise errors.bad_token(field)
    return layout.unpack(raw)[1:]


def _checked(field: str, wanted: bytes, parts: tuple[Any, ...], selection: bytes) -> int:
    kind, position, selected = parts
    if kind != wanted or position >= _POSITIONS:
        raise errors.bad_token(field)
    if selected != selection:
        raise errors.token_mismatch(field)
    return int(position)


def encode_key(key: tuple[str, str], selection: bytes) -> str:
    """A page_token of a list that is ordered by two texts without NUL."""
    raw = _KEY_HEAD.pack(_FORMAT, _KEY_KIND, selection) + "\0".join(key).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_key(text: str, selection: bytes) -> tuple[str, str]:
    """The two texts in a page_token. Raises BAD_TOKEN, or TOKEN_MISMATCH if it is of another selection."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        version, kind, selected = _KEY_HEAD.unpack_from(raw)
        first, second = raw[_KEY_HEAD.size :].decode().split("\0")
    except (binascii.Error, ValueError, struct.error):
        raise errors.bad_token("page_token") from None
    if version != _FORMAT or kind != _KEY_KIND:
        raise errors.bad_token("page_token")
    if selected != selection:
        raise errors.token_mismatch("page_token")
    return first, second
