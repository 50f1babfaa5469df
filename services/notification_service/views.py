"""Views as JSON: what a template sees of an event is kept like this until its digest is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

# An object whose one key is empty is a time: no label and no field has such a name.
_TIME = ""


def encode(view: Mapping[str, Any]) -> str:
    """A view of texts, numbers, lists, objects, None and times, as JSON."""
    return json.dumps(view, ensure_ascii=False, separators=(",", ":"), default=_encoded)


def decode(text: str) -> dict[str, Any]:
    """The view that was encoded."""
    view: dict[str, Any] = json.loads(text, object_hook=_decoded)
    return view


def _encoded(value: Any) -> dict[str, str]:
    if not isinstance(value, datetime):
        raise TypeError(f"a view has no {type(value).__name__}")
    return {_TIME: value.isoformat()}


def _decoded(found: dict[str, Any]) -> Any:
    return datetime.fromisoformat(found[_TIME]) if found.keys() == {_TIME} else found
