"""Settings from `TIDINGS_*` environment variables: frozen, read once, listed by `--help`, refused with one line.

A settings class is a `Settings` subclass whose `env_prefix` names its variables; each field has a description.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Base of every settings class."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", case_sensitive=False)


class LogSettings(Settings):
    """How every process logs."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_LOG_")

    level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR")
    format: str = Field(
        "auto", pattern="^(auto|json|console)$", description="json, console, or auto: console on a terminal"
    )


class InvalidSettingsError(Exception):
    """A setting is missing or wrong; the message names its variable."""


AnySettings = TypeVar("AnySettings", bound=Settings)


def variable(settings: type[Settings], field: str) -> str:
    """The name of the environment variable of a field."""
    return f"{settings.model_config.get('env_prefix', '')}{field}".upper()


def load(settings: type[AnySettings], **overrides: Any) -> AnySettings:
    """Reads a settings class from the environment. Raises InvalidSettingsError with one line per wrong variable."""
    known = {variable(settings, field) for field in settings.model_fields}
    prefix = settings.model_config.get("env_prefix", "").upper()
    unknown = [name for name in os.environ if name.upper().startswith(prefix) and name.upper() not in known]
    problems = [f"{name}: no such setting" for name in sorted(unknown)] if prefix.count("_") > 1 else []
    try:
        loaded = settings(**overrides)
    except ValidationError as error:
        problems += [
            f"{variable(settings, str(detail['loc'][0]) if detail['loc'] else '')}: {detail['msg']}"
            for detail in error.errors()
        ]
        raise InvalidSettingsError("\n".join(problems)) from None
    if problems:
        raise InvalidSettingsError("\n".join(problems))
    return loaded


def load_or_exit(settings: type[AnySettings]) -> AnySettings:
    """Like `load`, but ends the process with code 2 and the reason on standard error."""
    try:
        return load(settings)
    except InvalidSettingsError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def describe(*classes: type[Settings]) -> str:
    """A table of every variable with its default and meaning, for `--help`."""
    rows = []
    for settings in classes:
        for name, field in settings.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "required" if field.is_required() else "" if default is None else str(default)
            if isinstance(default, SecretStr):
                shown = "(secret)" if default.get_secret_value() else ""
            rows.append((variable(settings, name), field.description or "", shown))
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"  {name:<{width}}  {text}" + (f" [{default}]" if default else "") for name, text, default in rows
    )


def parser(prog: str, description: str, *classes: type[Settings]) -> argparse.ArgumentParser:
    """A command line whose `--help` lists the settings."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="settings (environment variables):\n" + describe(*classes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
