"""Settings from `TIDINGS_*` environment variables: frozen, read once, listed by `--help`, refused with one line.

A settings class is a `Settings` subclass whose `env_prefix` names its variables; each field has a description.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BeforeValidator,
    DirectoryPath,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from servicekit.addresses import is_loopback

_EMPTY_IS_UNSET = BeforeValidator(lambda value: None if value == "" else value)
OptionalFile = Annotated[FilePath | None, _EMPTY_IS_UNSET]
# One that need not be there yet.
OptionalPath = Annotated[Path | None, _EMPTY_IS_UNSET]
OptionalDirectory = Annotated[DirectoryPath | None, _EMPTY_IS_UNSET]

_HOST_AND_PORT = re.compile(r"(?:\[[^\[\]]+\]|[^:\[\]]+):(\d{1,5})")
_LARGEST_PORT = 65535


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


class ServerSettings(Settings):
    """Where a gRPC server listens, who may call it, and how it is known: what both services have in common.

    Without a file of callers everybody may do everything, so only this machine may be able to call. And nothing goes
    over a network in the clear, unless it is said that something else encrypts it.
    """

    listen: str = Field(description="address to serve gRPC on; port 0 takes a free one")
    callers_file: OptionalFile = Field(
        None, description="TOML file of callers and their tokens' hashes; required unless only this machine can call"
    )
    tls_certificate_file: OptionalFile = Field(None, description="PEM file of the server's certificate chain")
    tls_key_file: OptionalFile = Field(None, description="PEM file of its key")
    tls_client_ca_file: OptionalFile = Field(
        None, description="PEM file of authorities; every client must then show a certificate of one of them"
    )
    encrypted_elsewhere: bool = Field(
        False, description="something else encrypts what goes over a network (a mesh, a tunnel): do without TLS"
    )
    health_listen: str = Field(
        "", description="another address that serves health alone, without TLS, for probes; none if empty"
    )
    metrics_address: str = Field(
        "", description="host:port to serve metrics at for Prometheus, in the clear, to everybody; none if empty"
    )

    @field_validator("metrics_address")
    @classmethod
    def _is_host_and_port(cls, value: str) -> str:
        match = _HOST_AND_PORT.fullmatch(value)
        if value and (match is None or int(match[1]) > _LARGEST_PORT):
            raise ValueError("must be host:port, such as 127.0.0.1:9464 or [::]:9464, or empty")
        return value

    reflection: bool = Field(True, description="serve gRPC reflection, to callers that may call it")
    channelz: bool = Field(False, description="serve gRPC channelz: connections and their counters, to such callers")
    overdue_after: float = Field(
        30.0, ge=1, description="not ready while a background loop has not gone round for so long, seconds"
    )
    stuck_after: float = Field(
        300.0, ge=1, description="not alive, to be restarted, once a background loop has not for so long, seconds"
    )

    @model_validator(mode="after")
    def _restarts_last(self) -> Self:
        if self.stuck_after < self.overdue_after:
            overdue, stuck = (variable(type(self), name) for name in ("overdue_after", "stuck_after"))
            raise ValueError(f"{stuck}: must be at least {overdue}")
        return self

    @model_validator(mode="after")
    def _lets_nobody_in_by_accident(self) -> Self:
        listen, callers, certificate, key, client_ca, elsewhere = (
            variable(type(self), name)
            for name in (
                "listen", "callers_file", "tls_certificate_file", "tls_key_file", "tls_client_ca_file",
                "encrypted_elsewhere",
            )
        )  # fmt: skip
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError(f"{certificate}, {key}: set both or none")
        if self.tls_client_ca_file is not None and self.tls_certificate_file is None:
            raise ValueError(f"{client_ca}: needs {certificate} and {key}")
        if is_loopback(self.listen):
            return self
        if self.callers_file is None:
            raise ValueError(
                f"{listen}: other machines reach {self.listen}: set {callers}, or listen on 127.0.0.1 or a unix socket"
            )
        if self.tls_certificate_file is None and not self.encrypted_elsewhere:
            raise ValueError(
                f"{listen}: tokens would go to {self.listen} in the clear: set {certificate} and {key}, or "
                f"{elsewhere}=true if something else encrypts"
            )
        return self


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
        problems += [_problem(settings, detail["loc"], detail["msg"]) for detail in error.errors()]
        raise InvalidSettingsError("\n".join(problems)) from None
    if problems:
        raise InvalidSettingsError("\n".join(problems))
    return loaded


def _problem(settings: type[Settings], loc: tuple[int | str, ...], message: str) -> str:
    if not loc:  # what settings say together names them itself
        return message.removeprefix("Value error, ")
    return f"{variable(settings, str(loc[0]))}: {message}"


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
