"""Opaque tokens: where a list goes on and where a stream resumes, bound to what the request selects."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct

from notification_service import errors

_FORMAT = 1
_LAYOUT = struct.Struct("!BcQ8s")

# The field a token comes in, and the byte that tells its kind.
_KINDS = {"page_token": b"p", "resume_token": b"r"}

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


def encode(field: str, position: int, selection: bytes) -> str:
    """A token for a field, `page_token` or `resume_token`."""
    raw = _LAYOUT.pack(_FORMAT, _KINDS[field], position, selection)
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(field: str, text: str, selection: bytes) -> int:
    """The position in a token. Raises BAD_TOKEN, or TOKEN_MISMATCH if it is of another selection."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        version, kind, position, selected = _LAYOUT.unpack(raw)
    except (binascii.Error, ValueError, struct.error):
        raise errors.bad_token(field) from None
    if version != _FORMAT or kind != _KINDS[field] or position >= 1 << 63:
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
