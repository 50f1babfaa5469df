"""What a template is tried with: a made-up change, and whatever a caller gives instead of parts of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from servicekit.errors import Violation, invalid

_NOW = "2026-01-31T12:00:00+00:00"
_TIMES = frozenset({"create_time", "update_time", "delete_time", "purge_time", "time"})
_WHICH = ("current", "previous")

# What the template of a digest sees of it.
DIGEST: Mapping[str, Any] = {"name": "digest", "open_time": datetime.fromisoformat(_NOW)}


def items(seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two items for the template of a digest, of what the templates of their rules see."""
    subjects = ("The first of two things", "The second of two things")
    return [{**seen, "subject": subject, "rule": "sample"} for subject in subjects]


def _user(email: str) -> dict[str, Any]:
    return {
        "id": "0194787f-edbf-70d8-b96f-0311b82b0a8b",
        "username": "ada",
        "email": email,
        "display_name": "Ada Lovelace",
        "locale": "",
        "time_zone": "",
        "labels": {},
        "version": 2,
        "create_time": datetime.fromisoformat(_NOW),
        "update_time": datetime.fromisoformat(_NOW),
        "delete_time": None,
        "purge_time": None,
    }


def view(given: Mapping[str, Any], event_type: str) -> tuple[dict[str, Any], str]:
    """What a template sees, but for whom it is said to, and which address that is: of an event or, if `params` are
    given, of a send. Raises INVALID_FIELD.
    """
    base: dict[str, Any] = {"user": _user("ada@example.com"), "params": {}, "unsubscribe_url": ""}
    if "params" not in given:
        base = {
            "user": base["user"],
            "previous": None if event_type == "CREATED" else _user("ada@old.example"),
            "event": {
                "type": event_type,
                "time": datetime.fromisoformat(_NOW),
                "position": 1,
                "changed_fields": ["email"] if event_type == "UPDATED" else [],
                "actor": "",
            },
            "unsubscribe_url": "",
        }
    violations: list[Violation] = []
    which = given.get("recipient", "current")
    if which not in _WHICH:
        violations.append(Violation("sample.recipient", "must be current or previous"))
    for key, value in given.items():
        if key == "recipient":
            continue
        if key not in base:
            known = ", ".join((*base, "recipient", *(() if "params" in base else ("params",))))
            violations.append(Violation(f"sample.{key}", f"is none of {known}"))
        elif key == "unsubscribe_url":
            if isinstance(value, str):
                base[key] = value
            else:
                violations.append(Violation(f"sample.{key}", "must be a text"))
        elif key == "previous" and value is None:
            base[key] = None
        elif not isinstance(value, Mapping):
            violations.append(Violation(f"sample.{key}", "must be an object"))
        elif key == "params":
            base[key] = dict(value)
        else:
            if base[key] is None:
                base[key] = _user("ada@old.example")
            violations += _merge(base[key], value, f"sample.{key}")
    if which == "previous" and base.get("previous") is None:
        violations.append(Violation("sample.recipient", "is previous, and the sample has no previous user"))
    if violations:
        raise invalid(*violations)
    return copy.deepcopy(base), str(which)


def _merge(into: dict[str, Any], given: Mapping[str, Any], path: str) -> list[Violation]:
    violations = []
    for key, value in given.items():
        field = f"{path}.{key}"
        if key not in into:
            violations.append(Violation(field, f"is none of {', '.join(into)}"))
            continue
        try:
            into[key] = _converted(key, into[key], value)
        except ValueError as error:
            violations.append(Violation(field, str(error)))
    return violations


def _converted(key: str, like: Any, value: Any) -> Any:
    if key in _TIMES:
        if value is None and key != "time":
            return None
        try:
            time = datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise ValueError("must be a time such as 2026-01-31T12:00:00Z") from None
        if time.tzinfo is None:
            raise ValueError("must be a time with its offset, such as 2026-01-31T12:00:00Z")
        return time
    if isinstance(like, int):
        if not isinstance(value, (int, float)) or value != int(value):
            raise ValueError("must be a whole number")
        return int(value)
    if isinstance(like, dict):
        if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value.values()):
            raise ValueError("must be an object of texts")
        return dict(value)
    if isinstance(like, list):
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
            raise ValueError("must be a list of texts")
        return list(value)
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004 - of what a caller sent
    return value
