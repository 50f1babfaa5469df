"""Channels to the services, with the options that long streams and safe retries need."""

from __future__ import annotations

import json

import grpc.aio

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
    "tidings.notifications.v1.NotificationService": ("ListNotifications", "ListDeliveries", "GetInbox"),
}

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
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


def connect(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`, or to every address behind `dns:///host:port` in turn.

    Connects when first used. Unary calls that meet UNAVAILABLE are tried again, up to four times in all. So whoever
    uses generated stubs on this channel gives every mutation a request_id, as `Users` does.
    """
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
