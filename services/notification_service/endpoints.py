"""Webhook endpoints of the operator's file: `[[endpoints]]` with a name, a url, secrets and what each wants to hear.

    [[endpoints]]
    name = "crm"
    url = "https://crm.example.com/hooks/tidings"
    secret_env = "CRM_WEBHOOK_SECRETS"   # or secret = "whsec_..."
    events = ["CREATED", "DELETED"]      # all types if left out
    categories = ["account"]             # all categories if left out

Several secrets, separated by blanks, sign each call together, so that a receiver can go over to a new one at its own
pace.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from yarl import URL

from notification_service.destinations import BAD_SECRET, Destination, Secret, id_of_file, is_secret
from notification_service.rules import HEARD
from servicekit import configfile


class Endpoint(configfile.Entry):
    """Where webhooks go; the fields are the keys of its table."""

    name: str = Field(min_length=1, max_length=63)
    url: str
    secret: SecretStr | None = None
    secret_env: str | None = None
    events: frozenset[str] = frozenset(HEARD)
    categories: frozenset[str] = frozenset()

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        try:
            parsed = URL(url)
        except ValueError as error:
            raise ValueError(f"is no URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("must be an http or https URL")
        return url

    @field_validator("events")
    @classmethod
    def _known_types(cls, types: frozenset[str]) -> frozenset[str]:
        unknown = sorted(types - set(HEARD))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not an event type, these are: {', '.join(HEARD)}")
        return types

    @model_validator(mode="after")
    def _has_secrets(self) -> Self:
        if (self.secret is None) == (self.secret_env is None):
            raise ValueError("give either secret or secret_env")
        if self.secret_env is not None and not os.environ.get(self.secret_env):
            raise ValueError(f"secret_env: {self.secret_env} is not set")
        self.destination()
        return self

    def destination(self) -> Destination:
        """It as others see it; its target is its URL."""
        text = self.secret.get_secret_value() if self.secret else os.environ.get(self.secret_env or "", "")
        secrets = text.split()
        if not secrets or not all(map(is_secret, secrets)):
            raise ValueError(BAD_SECRET)
        return Destination(
            id=id_of_file(self.name),
            name=self.name,
            url=self.url,
            target=self.url,
            secrets=tuple(map(Secret, secrets)),
            events=self.events,
            categories=self.categories,
        )


def load(path: Path | None) -> tuple[Endpoint, ...]:
    """The endpoints of a file; none without one."""
    if path is None:
        return ()
    endpoints = configfile.read(path, "endpoints", Endpoint)
    seen: dict[str, str] = {}
    for endpoint in endpoints:
        if endpoint.url in seen:
            raise configfile.InvalidConfigError(
                f"{path}: endpoint {endpoint.name!r}: has the url of {seen[endpoint.url]!r}"
            )
        seen[endpoint.url] = endpoint.name
    return endpoints
