"""Mail providers of the operator's file, in the order in which they are asked.

    [[providers]]
    name = "relay"
    host = "smtp.example.com"
    port = 587
    tls = "starttls"                  # auto, off, starttls or tls
    username = "tidings"
    password_env = "RELAY_PASSWORD"   # the variable that holds the password
    rate = 50.0                       # mails a second that each replica sends there at most; any number if left out

The first that is not paused is asked. Without a file there is one provider, `smtp`, as the settings have it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from servicekit import configfile


class Provider(configfile.Entry):
    """One provider; the fields are the keys of its table."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    host: str = Field(min_length=1)
    port: int = Field(ge=1, le=65535)
    tls: Literal["auto", "off", "starttls", "tls"] = "auto"
    username: str = ""
    password: SecretStr | None = None
    password_env: str | None = None
    rate: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _has_password(self) -> Self:
        if self.password is not None and self.password_env is not None:
            raise ValueError("give either password or password_env")
        if self.password_env is not None and not os.environ.get(self.password_env):
            raise ValueError(f"password_env: {self.password_env} is not set")
        if self.secret and not self.username:
            raise ValueError("username: is required with a password")
        return self

    @property
    def secret(self) -> str:
        """The password; empty if there is none."""
        if self.password is not None:
            return self.password.get_secret_value()
        return os.environ.get(self.password_env, "") if self.password_env else ""


def load(path: Path | None, default: Provider) -> tuple[Provider, ...]:
    """The providers of a file, or the default one."""
    if path is None:
        return (default,)
    entries = configfile.read(path, "providers", Provider)
    if not entries:
        raise configfile.InvalidConfigError(f"{path}: has no provider")
    return entries
