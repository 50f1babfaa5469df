"""Settings of the console: `TIDINGS_CONSOLE_*`."""

from __future__ import annotations

from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from servicekit.addresses import is_loopback
from servicekit.settings import OptionalFile, Settings, variable


class ConsoleSettings(Settings):
    """Read once at start.

    The console replays and discards for whoever reaches it, so only this machine may reach it, unless it is said that
    something else lets only the right people through.
    """

    model_config = SettingsConfigDict(env_prefix="TIDINGS_CONSOLE_")

    listen: str = Field("127.0.0.1:8080", description="address to serve the page on; port 0 takes a free one")
    health_listen: str = Field("", description="another address that serves /healthz alone, for probes; none if empty")
    authenticated_elsewhere: bool = Field(
        False, description="something else (a proxy) lets only operators through: may listen beyond this machine"
    )
    hosts: str = Field(
        "",
        description="names by which browsers reach it besides localhost and loopback addresses, with commas between",
    )

    users_address: str = Field("127.0.0.1:50051", description="gRPC target of the user service")
    users_token_file: OptionalFile = Field(None, description="file that holds the token for the user service")
    users_tls: bool = Field(False, description="TLS to the user service; the system's authorities unless a file is set")
    users_ca_file: OptionalFile = Field(None, description="PEM file of the authorities of its certificate; means TLS")
    users_certificate_file: OptionalFile = Field(
        None, description="PEM file of the certificate chain to show it; means TLS"
    )
    users_key_file: OptionalFile = Field(None, description="PEM file of that certificate's key")

    notifications_address: str = Field("127.0.0.1:50052", description="gRPC target of the notification service")
    notifications_token_file: OptionalFile = Field(
        None, description="file that holds the token for the notification service"
    )
    notifications_tls: bool = Field(
        False, description="TLS to the notification service; the system's authorities unless a file is set"
    )
    notifications_ca_file: OptionalFile = Field(
        None, description="PEM file of the authorities of its certificate; means TLS"
    )
    notifications_certificate_file: OptionalFile = Field(
        None, description="PEM file of the certificate chain to show it; means TLS"
    )
    notifications_key_file: OptionalFile = Field(None, description="PEM file of that certificate's key")
    encrypted_elsewhere: bool = Field(
        False, description="something else encrypts the way to the services: send tokens without TLS"
    )

    otlp_listen: str = Field(
        "", description="loopback address that takes spans (OTLP by gRPC) and keeps them in memory; off if empty"
    )
    spans_kept: int = Field(5000, ge=1, le=1_000_000, description="spans kept at most")
    span_bytes_kept: int = Field(16 << 20, ge=1 << 16, description="bytes of spans, as they came, kept at most")
    jaeger_url: str = Field("", description="address of Jaeger's page, to link traces to; none if empty")

    events_kept: int = Field(500, ge=10, le=10_000, description="newest events of the feed kept in memory")
    max_browsers: int = Field(64, ge=1, le=10_000, description="pages open at once at most")

    @field_validator("otlp_listen")
    @classmethod
    def _takes_spans_of_this_machine(cls, value: str) -> str:
        if value and not is_loopback(value):
            raise ValueError("must be a loopback address: whoever reaches it can fill it")
        return value

    @field_validator("jaeger_url")
    @classmethod
    def _is_link(cls, value: str) -> str:
        if value and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc):
            raise ValueError("must begin with http:// or https:// and a host")
        return value.rstrip("/")

    @field_validator("listen", "health_listen")
    @classmethod
    def _has_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and port.isdecimal() and int(port) <= 65535):
            raise ValueError("must be HOST:PORT")
        return value

    @model_validator(mode="after")
    def _lets_nobody_in_by_accident(self) -> Self:
        if is_loopback(self.listen) or self.authenticated_elsewhere:
            return self
        listen, elsewhere = (variable(type(self), name) for name in ("listen", "authenticated_elsewhere"))
        raise ValueError(
            f"{listen}: other machines reach {self.listen}, and the console asks nobody who they are: listen on "
            f"127.0.0.1, or set {elsewhere}=true if something else lets only operators through"
        )

    @property
    def host_names(self) -> frozenset[str]:
        """What a request's Host may name, in lower case and without a port."""
        given = {name.strip().lower() for name in self.hosts.split(",") if name.strip()}
        return frozenset({"localhost", "127.0.0.1", "[::1]"} | given)
