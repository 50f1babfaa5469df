"""Templates: NAME.subject.txt, NAME.txt and NAME.html, rendered by Jinja in a sandbox.

HTML is escaped, text is not; a name that a template uses and nobody defined is an error, not an empty string.
Whatever goes wrong with one rendering is a RenderError with its reason, so that it stays the matter of one
notification.

A template sees `user` and `previous` (None at creation), `event` (type, time, position, changed_fields, actor),
`name` (how to address the recipient) and `recipient` (address, and whether it is the "current" or the "previous"
one).
"""

from __future__ import annotations

import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

BUILT_IN = Path(__file__).with_name("templates")

_LONGEST_REASON = 300


class RenderError(Exception):
    """A template is missing, wrong, or cannot be rendered for one event."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A subject and a text."""

    subject: str
    text: str


def _moment(value: datetime, time_zone: str = "") -> str:
    zone: tzinfo = UTC
    if time_zone:
        try:
            zone = zoneinfo.ZoneInfo(time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError):
            zone = UTC
    return value.astimezone(zone).strftime("%Y-%m-%d %H:%M %Z")


def _is_html(name: str | None) -> bool:
    return bool(name and name.endswith(".html"))


class Templates:
    """The templates of a folder of the operator's, if there is one, before the built-in ones."""

    def __init__(self, folder: Path | None = None) -> None:
        folders = [folder, BUILT_IN] if folder else [BUILT_IN]
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.FileSystemLoader(folders),
            autoescape=_is_html,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters["moment"] = _moment

    def check(self, name: str, *, html: bool) -> None:
        """Raises RenderError unless a template has all its parts and each can be compiled."""
        for suffix in ("subject.txt", "txt", *(["html"] if html else [])):
            self._get(f"{name}.{suffix}")

    def plain(self, name: str, context: Mapping[str, Any]) -> Plain:
        """Subject and text."""
        # A subject is one line: whatever comes in by a name cannot begin another header.
        subject = " ".join(self._render(f"{name}.subject.txt", context).split())
        return Plain(subject, self._render(f"{name}.txt", context).strip() + "\n")

    def html(self, name: str, context: Mapping[str, Any]) -> str:
        """The HTML part."""
        return self._render(f"{name}.html", context)

    def _get(self, file: str) -> jinja2.Template:
        try:
            return self._environment.get_template(file)
        except jinja2.TemplateNotFound as error:
            raise RenderError(f"template {error.name} is missing") from None
        except jinja2.TemplateSyntaxError as error:
            raise RenderError(f"template {error.name}, line {error.lineno}: {error.message}") from None

    def _render(self, file: str, context: Mapping[str, Any]) -> str:
        template = self._get(file)
        try:
            # NUL is the one character that Postgres' text cannot hold.
            return template.render(context).replace("\0", "")
        except Exception as error:
            raise RenderError(f"template {file}: {type(error).__name__}: {error}"[:_LONGEST_REASON]) from error
