"""Channels to the services: the options that long streams and safe retries need, TLS, and the caller's token."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from tidings.client.token import TokenChannel, TokenFile, checked

_Path = str | os.PathLike[str]

# Reads, and mutations that carry a request_id: the server answers a second attempt as it answered the first. Streams
# are not here: they resume by their tokens.
_RETRIED = {
    "tidings.users.v1.UserService": (
        "CreateUser",
        "GetUser",
        "BatchGetUsers",
        "ListUsers",
        "UpdateUser",
        "DeleteUser",
        "UndeleteUser",
        "BatchCreateUsers",
        "GetFeed",
    ),
    "tidings.notifications.v1.NotificationService": (
        "ListNotifications",
        "ListDeliveries",
        "GetInbox",
        "ExplainDelivery",
    ),
    "tidings.notifications.v1.EndpointService": ("CreateEndpoint", "GetEndpoint", "ListEndpoints"),
    "tidings.notifications.v1.PreferenceService": (
        "GetPreferences",
        "ListCategories",
        "GetSuppression",
        "ListSuppressions",
    ),
    "tidings.notifications.v1.InAppService": ("ListInAppNotifications", "GetInAppCounts"),
    "tidings.notifications.v1.TemplateService": ("ListTemplates",),
    "tidings.notifications.v1.SendService": ("SendNotification", "GetSend", "ListSends", "CancelSend"),
    "tidings.notifications.v1.DigestService": ("ListDigests", "GetDigest", "FlushDigest"),
}

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A replica tells its clients when it begins to stop, some seconds before it refuses calls.
    "healthCheckConfig": {"serviceName": "balancing"},
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service, methods in _RETRIED.items() for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A service that restarts is found again within seconds; the defaults take up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
)


def connect(
    address: str,
    *,
    token: str | None = None,
    token_file: _Path | None = None,
    tls: bool = False,
    ca: _Path | None = None,
    certificate: _Path | None = None,
    key: _Path | None = None,
    token_in_clear: bool = False,
    heed_health: bool = True,
) -> grpc.aio.Channel:
    """A channel to `host:port`, or to every address behind `dns:///host:port` in turn.

    Connects when first used. Unary calls that meet UNAVAILABLE are tried again, up to four times in all. So whoever
    uses generated stubs on this channel gives every mutation a request_id, as `Users` does.

    `token`, or the one in `token_file`, which is read again when it changes, is sent with every call. `tls` checks the
    server by the system's authorities, `ca` (PEM) by others; `certificate` (PEM, the chain) and `key` are shown to it;
    each of these files means TLS, and is read once. Without TLS a token goes to this machine only, unless
    `token_in_clear` says that something else encrypts.

    Replicas that say that they are starting or stopping are not called, unless `heed_health` is off.

    Raises ValueError for arguments that do not go together or files that do not hold what they should, OSError for
    files that cannot be read.
    """
    source = _token_source(token, token_file)
    local = is_local(address)
    credentials = _credentials(ca, certificate, key) if tls or ca or certificate or key else None
    if source is not None and credentials is None and not local and not token_in_clear:
        raise ValueError(f"the token would go to {address} in the clear: use TLS")
    # A proxy would take even what is meant for this machine to another one.
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if local else _OPTIONS
    if not heed_health:
        options = (*options, ("grpc.inhibit_health_checking", 1))
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    return channel if source is None else TokenChannel(channel, source)


def is_local(address: str) -> bool:
    """Whether what is sent to a target stays on this machine: a unix socket, localhost, a loopback IP address."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        # dns://server/name asks a server of its own choice what the name stands for.
        if rest.startswith("//") and not rest.startswith("///"):
            return False
        address = rest.lstrip("/")
    return all(_is_local_host(_host(one)) for one in address.split(","))


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, colon, _ = address.rpartition(":")
    return host if colon and ":" not in host else address


def _is_local_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token_source(token: str | None, token_file: _Path | None) -> Callable[[], str] | None:
    if token is not None and token_file is not None:
        raise ValueError("give a token or a file that holds it, not both")
    if token_file is not None:
        return TokenFile(token_file)
    if token is None:
        return None
    given = checked(token)
    return lambda: given


def _credentials(ca: _Path | None, certificate: _Path | None, key: _Path | None) -> grpc.ChannelCredentials:
    if (certificate is None) != (key is None):
        raise ValueError("a certificate and its key go together")
    # gRPC takes any bytes and fails when it connects; OpenSSL says at once what is wrong.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authorities = pair = None
    if ca is not None:
        authorities = Path(ca).read_bytes()
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise ValueError(f"{ca}: not certificates of authorities: {error}") from None
    if certificate is not None and key is not None:
        pair = Path(key).read_bytes(), Path(certificate).read_bytes()
        try:
            # A passphrase is given so that none is asked for at the terminal.
            context.load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            raise ValueError(f"{certificate}, {key}: not a certificate chain and its key: {error}") from None
    return grpc.ssl_channel_credentials(authorities, *(pair or (None, None)))
