"""Unsubscribe links: tokens that say which mail their reader may switch off, and that nobody else can make.

A token is base64url, without padding, of
    version (1 byte), channel (1), user id (16), hash of the address (8), category (1 to 63), signature (16)
The signature is HMAC-SHA256 over all before it; the hash is HMAC-SHA256 of the address, so that none can be found by
trying. Both are cut to their length, and each has a key of its own, derived from a key of the operator's file. The
first of these signs, each of them verifies: a new one is put before the others, and an old one stays for as long as its
mails may be opened.

Tokens do not expire, for mails are opened months later, and there is one way to write each: what was changed in any
letter does not verify.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from notification_service.categories import Categories
from notification_service.domain import EMAIL
from notification_service.settings import NotificationServiceSettings
from servicekit.configfile import InvalidConfigError
from servicekit.mounted import Contents, Mounted

# Below the path of the public URL.
PATH = "/u/"

_VERSION = 1
_CHANNELS = {EMAIL: 1}
_CHANNEL_NAMES = {number: name for name, number in _CHANNELS.items()}
_HEAD = struct.Struct(">BB16s8s")
_SIGNATURE_LENGTH = 16
_HASH_LENGTH = 8
_SHORTEST_KEY = 32


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256)


class Key:
    """One key of the file, as what is derived from it."""

    def __init__(self, secret: bytes) -> None:
        self._signing = _mac(secret, b"tidings unsubscribe signature")
        self._hashing = _mac(secret, b"tidings unsubscribe address")

    def sign(self, payload: bytes) -> bytes:
        """The signature of what stands before it."""
        return _mac(self._signing, payload)[:_SIGNATURE_LENGTH]

    def hash(self, address: str) -> bytes:
        """What stands for an address; the same in upper and lower case."""
        return _mac(self._hashing, address.casefold().encode())[:_HASH_LENGTH]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a token says: the user, the category and the channel of a mail, and, hidden, the address it went to."""

    user_id: uuid.UUID
    category: str
    channel: str
    address_hash: bytes
    _key: Key = field(repr=False, compare=False)

    def is_of(self, address: str) -> bool:
        """Whether the mail went to this address."""
        return hmac.compare_digest(self._key.hash(address), self.address_hash)


Keys = tuple[Key, ...]


def read(settings: NotificationServiceSettings, categories: Categories) -> Links | None:
    """What makes links as the settings want them; None if they want none. Raises InvalidConfigError."""
    if not settings.public_url or settings.link_keys_file is None:
        return None
    return Links(settings.public_url, load(settings.link_keys_file), categories)


def load(path: Path) -> Mounted[Keys]:
    """Reads a file of keys, one a line, each base64 of 32 bytes or more. Raises InvalidConfigError."""

    def make(contents: Contents) -> Keys:
        lines = [line.strip() for line in contents[0].splitlines()]
        found: list[Key] = []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                secret = base64.b64decode(line, validate=True)
            except binascii.Error:
                secret = b""
            if len(secret) < _SHORTEST_KEY:
                raise InvalidConfigError(f"{path}: line {number}: must be base64 of at least {_SHORTEST_KEY} bytes")
            found.append(Key(secret))
        if not found:
            raise InvalidConfigError(f"{path}: has no key: one a line, such as `openssl rand -base64 32` makes")
        return tuple(found)

    return Mounted("link keys", (path,), make)


class Links:
    """Makes and reads the links below `public_url`, which has no slash at its end; any thread may."""

    def __init__(self, public_url: str, keys: Mounted[Keys], categories: Categories) -> None:
        self.public_url = public_url
        self.keys = keys
        self._categories = categories

    def url(self, user_id: uuid.UUID, category: str, address: str) -> str:
        """The link of a mail to an address, the same as long as the first key is; empty for a mandatory category."""
        if self._categories.of(category).mandatory:
            return ""
        key = self.keys.value[0]
        payload = _HEAD.pack(_VERSION, _CHANNELS[EMAIL], user_id.bytes, key.hash(address)) + category.encode()
        return f"{self.public_url}{PATH}{_text(payload + key.sign(payload))}"

    def read(self, token: str) -> Claim | None:
        """What a token says; None if it is not one of ours."""
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        payload, signature = raw[:-_SIGNATURE_LENGTH], raw[-_SIGNATURE_LENGTH:]
        # Every key is tried, whichever it is: the time says nothing of it.
        fitting = [key for key in self.keys.value if hmac.compare_digest(key.sign(payload), signature)]
        if not fitting or _text(raw) != token or len(payload) <= _HEAD.size:
            return None
        version, channel, user_id, address_hash = _HEAD.unpack_from(payload)
        if version != _VERSION or channel not in _CHANNEL_NAMES:
            return None
        category = payload[_HEAD.size :].decode()
        return Claim(uuid.UUID(bytes=user_id), category, _CHANNEL_NAMES[channel], address_hash, fitting[0])


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
