"""The composition root: makes every part of the notification service, joins them, and takes them apart in order."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator

import grpc.aio

from notification_service import endpoints, rules
from notification_service.api import NotificationService
from notification_service.channels.email import EmailChannel
from notification_service.channels.webhook import WebhookChannel
from notification_service.compose import Composer
from notification_service.dispatcher import Dispatcher, Lane
from notification_service.domain import EMAIL, WEBHOOK
from notification_service.inbox import Inbox
from notification_service.retries import Policy
from notification_service.settings import NotificationServiceSettings
from notification_service.subscriber import Subscriber
from notification_service.tables import SCHEMA_REVISION
from notification_service.tail import Tail
from notification_service.templates import Templates
from notification_service.watch import Streams
from servicekit import database, guard, rpc, schema, telemetry
from servicekit.configfile import InvalidConfigError
from servicekit.database import Pool
from servicekit.entrance import Entrance, open_entrance
from servicekit.health import Health
from servicekit.settings import variable
from servicekit.tasks import Background
from tidings.client import Batch, CursorStore, UserFeed, connect
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc
from tidings.users.v1 import users_pb2, users_pb2_grpc

NAME = "tidings-notifications"
_SERVICE = notifications_pb2.DESCRIPTOR.services_by_name["NotificationService"]

# One lease per lane, the recorder, and one to spare.
_DISPATCH_CONNECTIONS = 4
_GET_FEED_TIMEOUT = 5.0
# A process that is paused must not hold up who changes parked deliveries elsewhere.
_QUERY_SESSION = {"statement_timeout": "10s", "idle_in_transaction_session_timeout": "5s"}


def composer(settings: NotificationServiceSettings) -> Composer:
    """Reads the operator's files. Raises InvalidConfigError."""
    made = Composer(
        rules.load(settings.rules_file),
        Templates(settings.templates_dir),
        endpoints.load(settings.webhooks_file),
        settings.mail_from,
    )
    made.check()
    return made


async def serve(settings: NotificationServiceSettings, composer: Composer) -> int:
    """Runs the service until it is told to stop. Returns the exit code. Raises InvalidConfigError."""
    entrance = open_entrance(settings, rpc.methods(_SERVICE))
    users = _users(settings)
    url = settings.database_url.get_secret_value()
    await schema.wait(url, NAME, SCHEMA_REVISION)
    queries = database.pool(url, f"{NAME}-queries", size=settings.query_connections, **_QUERY_SESSION)
    dispatch = database.pool(url, f"{NAME}-dispatch", size=_DISPATCH_CONNECTIONS, statement_timeout="10s")
    with telemetry.tracing(NAME):
        async with queries, dispatch, users:
            return await _serve(settings, entrance, composer, url, queries, dispatch, users)


def _users(settings: NotificationServiceSettings) -> grpc.aio.Channel:
    """The way to the user service."""
    try:
        return connect(
            settings.users_address,
            token_file=settings.users_token_file,
            tls=settings.users_tls,
            ca=settings.users_ca_file,
            certificate=settings.users_certificate_file,
            key=settings.users_key_file,
            token_in_clear=settings.encrypted_elsewhere,
        )
    except (ValueError, OSError) as error:
        raise InvalidConfigError(f"{variable(type(settings), 'users_*')}: {error}") from None


async def _serve(
    settings: NotificationServiceSettings,
    entrance: Entrance,
    composer: Composer,
    url: str,
    queries: Pool,
    dispatch: Pool,
    users: grpc.aio.Channel,
) -> int:
    background = Background()
    tail = Tail(queries, settings.poll_interval)
    streams = Streams(
        queries,
        tail,
        max_streams=settings.max_streams,
        max_streams_per_caller=settings.max_streams_per_caller,
        max_stream_age=settings.max_stream_age,
        reconnect_spread=settings.reconnect_spread,
    )
    dispatcher = Dispatcher(
        dispatch,
        _lanes(settings, composer),
        Policy(settings.tries, settings.retry_base, settings.retry_factor, settings.retry_cap),
        send_timeout=settings.send_timeout,
        lease=settings.lease,
        poll_interval=settings.poll_interval,
    )

    def stored() -> None:
        dispatcher.wake()
        tail.hint()

    def open_feed(cursor: CursorStore) -> AsyncGenerator[Batch, None]:
        feed = UserFeed(
            users,
            cursor=cursor,
            include_previous=True,
            bookmark_interval=settings.feed_bookmark_interval,
            progress=True,
        )
        return aiter(feed)

    async def log_id() -> uuid.UUID:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(users)
        feed = await stub.GetFeed(users_pb2.GetFeedRequest(), timeout=_GET_FEED_TIMEOUT)
        return uuid.UUID(feed.log_id)

    subscriber = Subscriber(
        url, Inbox(composer, stored), open_feed=open_feed, log_id=log_id, patience=settings.standby_patience
    )
    health = Health(_SERVICE.full_name)
    server = rpc.server(entrance, health, _SERVICE)
    guard.add(
        server,
        entrance.source,
        notifications_pb2_grpc.add_NotificationServiceServicer_to_server,
        NotificationService(queries, streams, dispatcher.wake),
    )

    async def is_ready() -> bool:
        async with queries.connection() as connection:
            await connection.execute("SELECT 1")
        return background.alive

    async def drain() -> None:
        await asyncio.gather(
            streams.drain(settings.drain_time),
            subscriber.drain(settings.drain_time),
            dispatcher.drain(settings.drain_time),
        )

    for loop, name in (
        (subscriber.run(), "subscriber"),
        (dispatcher.run_lane(EMAIL), "email"),
        (dispatcher.run_lane(WEBHOOK), "webhook"),
        (dispatcher.record(), "recorder"),
        (dispatcher.tidy(), "tidier"),
        (tail.run(), "tail"),
    ):
        background.start(loop, name)
    return await rpc.serve(server, entrance, health, background, is_ready=is_ready, drain=drain, grace=settings.grace)


def _lanes(settings: NotificationServiceSettings, composer: Composer) -> dict[str, Lane]:
    email = EmailChannel(
        settings.smtp_host,
        settings.smtp_port,
        sender=settings.mail_from,
        tls=settings.smtp_tls,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value(),
        timeout=settings.send_timeout,
    )
    webhook = WebhookChannel(
        composer.endpoints,
        connections=settings.webhook_slots,
        timeout=settings.send_timeout,
        networks=settings.webhook_networks_allowed,
    )
    return {EMAIL: Lane(email, settings.email_slots), WEBHOOK: Lane(webhook, settings.webhook_slots)}
