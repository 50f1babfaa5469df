"""The whole system as it stands on a network: TLS with certificates of both sides, and a token for every caller."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.harness import Authority, Callers, Database, MailCatcher, Services
from tests.users.calls import Stub, create, replay
from tidings.client import ApiError, Notifications, connect


def _here(address: str) -> str:
    """Where a service that listens everywhere is reached."""
    return f"127.0.0.1:{address.rpartition(':')[2]}"


async def test_nothing_is_said_in_the_clear_and_tokens_rotate(
    services: Services,
    users_database: Database,
    notifications_database: Database,
    mail_catcher: MailCatcher,
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    server = {
        "listen": "0.0.0.0:0",
        "health_listen": "127.0.0.1:0",
        "tls_certificate_file": certificate,
        "tls_key_file": key,
        "tls_client_ca_file": authority.ca,
    }
    of_users, of_notifications = Callers(tmp_path / "users.toml"), Callers(tmp_path / "notifications.toml")
    admin = of_users.add("admin")
    old = of_users.add("notifications", "WatchUsers", "GetFeed")
    reader = of_notifications.add("reader", "tidings.notifications.v1.NotificationService/*")
    (token_file := tmp_path / "token").write_text(old)
    certificate, key = authority.issue("client", "client")
    tls = {"ca": authority.ca, "certificate": certificate, "key": key}

    users = await services.users(users_database, callers_file=of_users.path, **server).start()
    notifications = await services.notifications(
        notifications_database,
        _here(users.address),
        mail_catcher,
        callers_file=of_notifications.path,
        users_token_file=token_file,
        users_ca_file=authority.ca,
        users_certificate_file=certificate,
        users_key_file=key,
        **server,
    ).start()

    async with (
        connect(_here(users.address), token=admin, **tls) as to_users,
        connect(_here(notifications.address), token=reader, **tls) as to_notifications,
        connect(_here(notifications.address), token=admin, **tls) as astray,
    ):
        stub, inbox = Stub(to_users), Notifications(to_notifications)
        await stub.CreateUser(create(email="first@example.com"))
        [mail] = await mail_catcher.wait(1)
        assert mail.recipients == ("first@example.com",)
        [notification] = [one async for one in inbox.list()]
        [event] = await replay(stub)
        assert (notification.event_id, event.actor) == (event.id, "admin")
        # What one service knows is not known to the other.
        with pytest.raises(ApiError) as caught:
            await Notifications(astray).inbox()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNKNOWN_TOKEN")

        # Both tokens are good until the caller sends the new one; then the old one ends.
        new = of_users.add("notifications", "WatchUsers", "GetFeed")
        token_file.write_text(new)
        of_users.remove(old)
        await users.kill()
        await users.restart()
        await stub.CreateUser(create(email="second@example.com"), wait_for_ready=True)
        assert [mail.recipients[0] for mail in await mail_catcher.wait(2)] == [
            "first@example.com",
            "second@example.com",
        ]

    assert (await users.stop(), await notifications.stop()) == (0, 0)


async def test_without_a_token_nothing_is_followed_and_the_log_says_why(
    services: Services, users_database: Database, notifications_database: Database, tmp_path: Path
) -> None:
    callers = Callers(tmp_path / "users.toml")
    callers.add("admin")
    users = await services.users(users_database, callers_file=callers.path).start()
    notifications = services.notifications(notifications_database, users)
    await notifications.launch()
    record = await notifications.wait_log("the user service cannot be asked")
    assert record["error"].startswith("UNAUTHENTICATED: no token")
    await notifications.wait_log("not ready", reason="the user service does not let this one in: UNAUTHENTICATED")

    exposed = services.notifications(
        notifications_database, "192.0.2.1:50051", users_token_file=callers.path.with_name("token")
    )
    callers.path.with_name("token").write_text("secret")
    await exposed.launch()
    assert await exposed.wait() == 2
    [line] = exposed.lines
    assert line.startswith("error: TIDINGS_NOTIFICATIONS_USERS_*: the token would go to 192.0.2.1:50051 in the clear")
