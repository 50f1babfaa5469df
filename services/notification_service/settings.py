"""Settings of the notification service: `TIDINGS_NOTIFICATIONS_*`."""

from __future__ import annotations

import re
from email.utils import parseaddr
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from notification_service import egress
from servicekit.addresses import is_loopback
from servicekit.settings import OptionalDirectory, OptionalFile, OptionalPath, ServerSettings, variable

# Nothing that would end a header's `<...>`, and no user, query or fragment.
_BASE_URL = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?")
_LONGEST_BASE_URL = 300
_LARGEST_PORT = 65535


class NotificationServiceSettings(ServerSettings):
    """Read once at start; times in seconds."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_NOTIFICATIONS_")

    database_url: SecretStr = Field(description="libpq URL of the notifications database")
    listen: str = Field("127.0.0.1:50052", description="address to serve gRPC on; port 0 takes a free one")
    users_address: str = Field("127.0.0.1:50051", description="gRPC target of the user service")
    users_token_file: OptionalFile = Field(None, description="file that holds the token for the user service")
    users_tls: bool = Field(False, description="TLS to the user service; the system's authorities unless a file is set")
    users_ca_file: OptionalFile = Field(None, description="PEM file of the authorities of its certificate; means TLS")
    users_certificate_file: OptionalFile = Field(
        None, description="PEM file of the certificate chain to show it; means TLS"
    )
    users_key_file: OptionalFile = Field(None, description="PEM file of that certificate's key")

    rules_file: OptionalFile = Field(None, description="TOML file of rules; the built-in ones unless set")
    categories_file: OptionalFile = Field(None, description="TOML file of categories; the built-in ones unless set")
    templates_dir: OptionalDirectory = Field(None, description="folder of templates that come before the built-in ones")
    webhooks_file: OptionalFile = Field(None, description="TOML file of webhook endpoints; none unless set")
    policies_file: OptionalFile = Field(None, description="TOML file of policies, how each channel tries")
    providers_file: OptionalFile = Field(None, description="TOML file of mail providers; SMTP_* is one unless set")

    webhook_networks: str = Field(
        "", description="networks that webhooks may go to besides public addresses, such as 10.0.0.0/8 fd00::/8"
    )

    smtp_host: str = Field("127.0.0.1", description="mail server")
    smtp_port: int = Field(1025, ge=1, le=65535, description="its port")
    smtp_tls: Literal["auto", "off", "starttls", "tls"] = Field(
        "auto", description="auto: STARTTLS if offered; starttls: required; tls: from the first byte; off"
    )
    smtp_username: str = Field("", description="log in at the mail server as; nobody if empty")
    smtp_password: SecretStr = Field(SecretStr(""), description="with this password")
    mail_from: str = Field("Tidings <no-reply@tidings.localhost>", description="sender of every mail")

    email_slots: int = Field(32, ge=1, le=1000, description="mails on their way at once, each on its own connection")
    webhook_slots: int = Field(32, ge=1, le=1000, description="webhooks on their way at once")
    send_timeout: float = Field(10.0, gt=0, le=300, description="bound of one attempt, seconds")
    lease: float = Field(30.0, gt=0, le=3600, description="a delivery of a dead process is taken over after, seconds")
    tries: int = Field(8, ge=1, le=100, description="attempts before a delivery is parked")
    retry_base: float = Field(2.0, gt=0, description="bound of the pause after the first attempt, seconds")
    retry_factor: float = Field(4.0, ge=1, description="by what the bound grows with each further attempt")
    retry_cap: float = Field(3600.0, gt=0, description="the greatest bound, seconds")

    max_age: float = Field(
        259_200.0, gt=0, description="a delivery is given up so long after its first attempt, seconds"
    )
    breaker_failures: int = Field(
        5, ge=1, le=1000, description="outages in a row that pause what goes to a provider or an endpoint"
    )
    breaker_pause: float = Field(5.0, gt=0, description="the first such pause, doubled each time, seconds")
    breaker_cap: float = Field(300.0, gt=0, description="the longest such pause, seconds")

    poll_interval: float = Field(
        1.0, gt=0, le=60, description="longest time between looks for due deliveries and other replicas' work, seconds"
    )
    feed_bookmark_interval: float = Field(
        10.0, ge=1, le=300, description="how often the cursor moves when nothing happens, seconds"
    )
    standby_patience: float = Field(
        40.0, ge=5, description="a replica of an earlier release that has stored nothing for so long is passed over"
    )
    shards: int = Field(
        1,
        ge=1,
        le=64,
        description="parts of the user feed, which replicas share; counts once all replicas say the same",
    )
    shard_lease: float = Field(
        5.0, ge=1, le=60, description="the shards of a replica that is gone are taken over after, seconds"
    )
    public_url: str = Field(
        "",
        description="base URL by which recipients reach HTTP_LISTEN: mails have links to unsubscribe by; none if empty",
    )
    link_keys_file: OptionalPath = Field(
        None,
        description="file of the keys that sign these links, one a line, base64 of 32 bytes; the first signs; read "
        "only with PUBLIC_URL",
    )
    http_listen: str = Field(
        "127.0.0.1:8090", description="address to serve these links' pages on, in the clear; only with PUBLIC_URL"
    )

    notifications_kept: float = Field(
        365 * 86_400.0,
        ge=86_400,
        le=100 * 365 * 86_400.0,
        description="how long notifications, sends and digests are kept; longer than the user service keeps events, "
        "seconds",
    )
    deleted_kept: float = Field(
        30 * 86_400.0,
        ge=86_400,
        le=100 * 365 * 86_400.0,
        description="how long it is kept that a user was deleted, at least, seconds",
    )

    query_connections: int = Field(8, ge=1, le=64, description="connections for reads at most")
    max_streams: int = Field(2000, ge=1, description="open streams at most; more are refused for the time being")
    max_streams_per_caller: int = Field(
        200, ge=1, description="open streams of one caller at most, where callers are known"
    )
    max_stream_age: float = Field(
        1800.0, ge=1, description="a stream is asked to reconnect after this, jittered, seconds"
    )

    drain_time: float = Field(
        12.0, ge=0, le=600, description="what streams and attempts get to end at a shutdown, seconds"
    )
    reconnect_spread: float = Field(
        3.0, ge=0, le=300, description="drained clients reconnect spread over this, seconds"
    )
    grace: float = Field(5.0, ge=0, le=300, description="what running calls get at a shutdown, seconds")

    @field_validator("mail_from")
    @classmethod
    def _is_mailbox(cls, value: str) -> str:
        local, at, host = parseaddr(value)[1].rpartition("@")
        if not (local and at and host):
            raise ValueError("must be an address, or a name and an address in <>")
        return value

    @field_validator("public_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not value:
            return value
        if not _BASE_URL.fullmatch(value) or len(value) > _LONGEST_BASE_URL:
            raise ValueError("must be such as https://notifications.example.com, in ASCII and without a query")
        parts = urlsplit(value)
        # Mail programs unsubscribe over https alone.
        if parts.scheme != "https" and not is_loopback(f"[{parts.hostname}]"):
            raise ValueError("must begin with https://, but for this machine")
        return value.rstrip("/")

    @field_validator("http_listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not (host and port.isdecimal() and int(port) <= _LARGEST_PORT):
            raise ValueError("must be HOST:PORT")
        return value

    @model_validator(mode="after")
    def _signs_its_links(self) -> Self:
        if self.public_url and (self.link_keys_file is None or not self.link_keys_file.is_file()):
            url, keys = (variable(type(self), name) for name in ("public_url", "link_keys_file"))
            there = f", and there is no file {self.link_keys_file}" if self.link_keys_file else ""
            raise ValueError(f"{url}: needs {keys}: the links are signed{there}")
        return self

    @field_validator("webhook_networks")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        for text in value.replace(",", " ").split():
            egress.network(text)
        return value

    @property
    def webhook_networks_allowed(self) -> tuple[egress.Network, ...]:
        """Those networks."""
        return tuple(egress.network(text) for text in self.webhook_networks.replace(",", " ").split())

    @field_validator("lease")
    @classmethod
    def _outlasts_attempts(cls, value: float, info: ValidationInfo) -> float:
        if value < 2 * info.data.get("send_timeout", 0.0):
            raise ValueError("must be at least twice TIDINGS_NOTIFICATIONS_SEND_TIMEOUT")
        return value

    @field_validator("standby_patience")
    @classmethod
    def _outlasts_bookmarks(cls, value: float, info: ValidationInfo) -> float:
        if value < 2 * info.data.get("feed_bookmark_interval", 0.0):
            raise ValueError("must be at least twice TIDINGS_NOTIFICATIONS_FEED_BOOKMARK_INTERVAL")
        return value
