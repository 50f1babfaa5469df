"""Settings of the local system: `TIDINGS_DEVSTACK_*`."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from servicekit.addresses import is_loopback
from servicekit.settings import Settings


class DevstackSettings(Settings):
    """Read once at start; times in seconds."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_DEVSTACK_")

    data_dir: Path = Field(Path(".tidings"), description="where everything is kept: postgres/, mail/, links.keys")
    host: str = Field("127.0.0.1", min_length=1, description="loopback IP address that every part listens on")
    users_port: int = Field(50051, ge=1, le=65535, description="gRPC port of the user service")
    notifications_port: int = Field(50052, ge=1, le=65535, description="gRPC port of the notification service")
    console_port: int = Field(8080, ge=1, le=65535, description="HTTP port of the console")
    otlp_port: int = Field(4319, ge=1, le=65535, description="port on which the console takes spans, OTLP by gRPC")
    smtp_port: int = Field(2525, ge=1, le=65535, description="SMTP port of the mail catcher")
    users_metrics_port: int = Field(9464, ge=1, le=65535, description="port of the user service's metrics")
    notifications_metrics_port: int = Field(
        9465, ge=1, le=65535, description="port of the notification service's metrics"
    )
    pages_port: int = Field(8090, ge=1, le=65535, description="HTTP port of the pages that links in mails lead to")
    stop_time: float = Field(20.0, gt=0, le=600, description="what a part gets to stop before it is killed, seconds")
    late_after: float = Field(10.0, gt=0, description="a part that is not ready after this is said to be late, seconds")

    @field_validator("host")
    @classmethod
    def _may_listen_on(cls, value: str) -> str:
        # The local system has no tokens, no TLS, and a mail catcher that anyone could fill.
        if not is_loopback(f"[{value}]"):
            raise ValueError("must be a loopback address, such as 127.0.0.1 or ::1")
        return value

    @property
    def link_keys(self) -> Path:
        """The file of the key that signs links in mails."""
        return self.data_dir / "links.keys"

    @property
    def mail_dir(self) -> Path:
        """Where the mail catcher stores messages."""
        return self.data_dir / "mail"


class MailCatcherSettings(DevstackSettings):
    """Of a mail catcher on its own, which may listen on any network: in a cluster a policy says who may fill it."""

    host: str = Field("127.0.0.1", description="IP address to listen on")

    @field_validator("host")
    @classmethod
    def _may_listen_on(cls, value: str) -> str:
        ip_address(value)
        return value
