"""What a request must look like: each function returns what is stored, or adds to a list of violations.

Every check runs, so that one answer names every invalid field. Nothing here knows the state of the directory.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import email_validator
from google.protobuf import timestamp_pb2

from servicekit.errors import ResourceExhaustedError, Violation, invalid
from tidings.users.v1 import users_pb2

LONGEST_DISPLAY_NAME = 256
MOST_LABELS = 32
LONGEST_LABEL_KEY = 63
LONGEST_LABEL_VALUE = 256
LARGEST_USER = 16_000
MOST_IN_BATCH = 1000
# What is wrong with a long list is told of its first few.
MOST_NAMED = 10

# The fields that callers set, in the order of their numbers.
CALLER_FIELDS = ("username", "email", "display_name", "locale", "time_zone", "labels")

_USERNAME = re.compile(r"[a-z0-9._-]{1,64}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TIME_ZONES = frozenset(zoneinfo.available_timezones())
# Local parts that email-validator leaves as they are, of the kind that nearly all addresses have. Others take the long
# way.
_PLAIN_LOCAL_PART = re.compile(r"(?=.{1,64}@)[a-z0-9_+-]+(\.[a-z0-9_+-]+)*@")
_LONGEST_PLAIN_ADDRESS = 200

Violations = list[Violation]


@lru_cache(maxsize=4096)
def _domain(text: str) -> tuple[str, str] | None:
    """`(domain, ascii_domain)` as email-validator has them, or None if it refuses the domain."""
    try:
        checked = email_validator.validate_email(f"x@{text}", check_deliverability=False)
    except email_validator.EmailNotValidError:
        return None
    return checked.domain, checked.ascii_domain


def email(text: str, path: str, violations: Violations) -> tuple[str, str]:
    """The normalized address and its key, `("", "")` if it is refused; `path` is that of the user.

    Addresses are what `email_validator.validate_email(check_deliverability=False)` accepts; the domain, its slow part,
    is remembered.
    """
    plain = _PLAIN_LOCAL_PART.match(text)
    if plain and len(text) <= _LONGEST_PLAIN_ADDRESS and (domain := _domain(text[plain.end() :])) is not None:
        local = text[: plain.end()]
        return local + domain[0], local + domain[1]
    try:
        checked = email_validator.validate_email(text, check_deliverability=False)
    except email_validator.EmailNotValidError as error:
        violations.append(Violation(f"{path}.email", str(error)))
        return "", ""
    return checked.normalized, f"{checked.local_part.casefold()}@{checked.ascii_domain}"


def email_key(address: str) -> str:
    """What uniqueness of an address is judged by: its local part without case, its domain in ASCII."""
    return email(address, "user", [])[1]


def _username(text: str) -> str | None:
    """What is wrong with it, if anything; so do the next."""
    return None if _USERNAME.fullmatch(text) else "must be 1 to 64 of a-z, 0-9, '.', '_' and '-'"


def _display_name(text: str) -> str | None:
    if len(text) > LONGEST_DISPLAY_NAME:
        return f"must be at most {LONGEST_DISPLAY_NAME} characters"
    return "must not hold control characters" if _CONTROL.search(text) else None


@lru_cache(maxsize=4096)
def _locale(text: str) -> str | None:
    # Takes a tenth of a service's start, and many a service never sees a locale.
    import langcodes

    if "_" not in text and langcodes.tag_is_valid(text):
        return None
    return "must be a BCP 47 language tag, for example de-CH"


def _time_zone(text: str) -> str | None:
    return None if text in _TIME_ZONES else "must be an IANA time zone, for example Europe/Zurich"


def labels(given: Mapping[str, str], path: str, violations: Violations) -> None:
    """Checks labels, those of a user or of a filter."""
    if len(given) > MOST_LABELS:
        violations.append(Violation(path, f"must be at most {MOST_LABELS}"))
        return
    for key, value in given.items():
        if not 1 <= len(key.encode()) <= LONGEST_LABEL_KEY:
            violations.append(Violation(path, f"key {key[:80]!r} must be 1 to {LONGEST_LABEL_KEY} bytes"))
        if len(value.encode()) > LONGEST_LABEL_VALUE:
            violations.append(Violation(f"{path}.{key}", f"must be at most {LONGEST_LABEL_VALUE} bytes"))
        if "\x00" in key or "\x00" in value:
            violations.append(Violation(path, "must not hold NUL"))


_OPTIONAL_TEXTS = (("display_name", _display_name), ("locale", _locale), ("time_zone", _time_zone))


def check(
    user: users_pb2.User, given_labels: Mapping[str, str], fields: tuple[str, ...], path: str, violations: Violations
) -> str:
    """Checks the named fields of a request's user and normalizes its email in place. Returns the email's key, "" if the
    email is not among the fields. `given_labels` are the user's, read from the message once, for that takes long.
    """
    key = ""
    if "username" in fields and (wrong := _username(user.username)) is not None:
        violations.append(Violation(f"{path}.username", wrong))
    if "email" in fields:
        given = user.email
        normalized, key = email(given, path, violations)
        if normalized != given:
            user.email = normalized
    for field, wrong_with in _OPTIONAL_TEXTS:
        if field in fields and (text := getattr(user, field)) and (wrong := wrong_with(text)) is not None:
            violations.append(Violation(f"{path}.{field}", wrong))
    if "labels" in fields and given_labels:
        labels(given_labels, f"{path}.labels", violations)
    if user.ByteSize() > LARGEST_USER:
        raise ResourceExhaustedError(
            f"{path}: is {user.ByteSize()} bytes encoded, the limit is {LARGEST_USER}",
            reason="USER_TOO_LARGE",
            metadata={"field": path, "limit_bytes": str(LARGEST_USER)},
        )
    return key


def keep_caller_fields(user: users_pb2.User) -> None:
    """Clears what the service assigns, and fields that this release does not know."""
    user.DiscardUnknownFields()
    clear = user.ClearField
    clear("id")
    clear("version")
    clear("create_time")
    clear("update_time")
    clear("delete_time")
    clear("purge_time")


def user_id(text: str, path: str) -> bytes:
    """The 16 bytes of a user's id; INVALID_ARGUMENT if it is none."""
    parsed = _uuid(text)
    if parsed is None:
        raise invalid(Violation(path, "must be a UUID" if text else "is required"))
    return parsed


def user_ids(texts: Sequence[str], most: int, path: str, violations: Violations) -> list[bytes]:
    """The 16 bytes of each of at most `most` ids. Of those that are none the first few are named."""
    if len(texts) > most:
        violations.append(Violation(path, f"must be at most {most}"))
        return []
    parsed = [_uuid(text) for text in texts]
    wrong = [index for index, user_id in enumerate(parsed) if user_id is None]
    violations.extend(Violation(f"{path}[{index}]", "must be a UUID") for index in wrong[:MOST_NAMED])
    return [user_id for user_id in parsed if user_id is not None]


def request_id(text: str, path: str, violations: Violations) -> bytes | None:
    """The 16 bytes of a request_id, None if there is none."""
    if not text:
        return None
    parsed = _uuid(text)
    if parsed is None:
        violations.append(Violation(path, "must be a UUID"))
    return parsed


def _uuid(text: str) -> bytes | None:
    # The one canonical spelling; uuid.UUID takes braces, URNs and bare hex as well, and ten times as long.
    return bytes.fromhex(text.replace("-", "")) if _UUID.fullmatch(text) else None


def time(stamp: timestamp_pb2.Timestamp, path: str) -> datetime:
    """The first moment at or after a timestamp that Postgres can tell from others: it counts microseconds."""
    try:
        whole = datetime.fromtimestamp(stamp.seconds, UTC)
        if not 0 <= stamp.nanos < 1_000_000_000:
            raise ValueError
        return whole + timedelta(microseconds=-(-stamp.nanos // 1000))
    except (ValueError, OverflowError, OSError):
        raise invalid(Violation(path, "must be a time of the years 1 to 9999")) from None


def mask(paths: list[str]) -> tuple[str, ...]:
    """The fields of an update mask in the order of their numbers; INVALID_ARGUMENT names a path that is none of
    them.
    """
    if not paths:
        raise invalid(Violation("update_mask", f"is required: any of {', '.join(CALLER_FIELDS)}"))
    unknown = [path for path in paths if path not in CALLER_FIELDS]
    if unknown:
        raise invalid(
            *(Violation("update_mask", f"{path!r} is not one of {', '.join(CALLER_FIELDS)}") for path in unknown)
        )
    return tuple(field for field in CALLER_FIELDS if field in paths)
