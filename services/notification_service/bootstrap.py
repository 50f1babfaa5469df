"""The composition root: makes every part of the notification service, joins them, and takes them apart in order."""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc.aio
import psycopg

from notification_service import categories, endpoints, lanes, links, metrics, reset, retention, rules, template_reload
from notification_service.api.digests import DigestService
from notification_service.api.endpoints import EndpointService
from notification_service.api.explanations import Explainer
from notification_service.api.in_app import InAppService
from notification_service.api.notifications import NotificationService
from notification_service.api.preferences import PreferenceService
from notification_service.api.sends import SendService
from notification_service.api.templates import TemplateService
from notification_service.categories import Categories
from notification_service.compose import Composer, no_link
from notification_service.destinations import Destination
from notification_service.digester import Digester
from notification_service.dispatcher import Dispatcher
from notification_service.domain import EMAIL
from notification_service.follower import STORING_SESSION, Source
from notification_service.inbox import Inbox
from notification_service.lanes import Sending
from notification_service.links import Links
from notification_service.recipients import Recipients
from notification_service.recipients import Source as RecipientsSource
from notification_service.registry import Endpoints
from notification_service.sender import Sender
from notification_service.settings import NotificationServiceSettings
from notification_service.store import digests as digest_store
from notification_service.store import recipients as recipient_store
from notification_service.store import sends, standing
from notification_service.subscriber import LONGEST_PAUSE, Subscriber
from notification_service.tables import SCHEMA_REVISION
from notification_service.tail import Tail
from notification_service.templates import Templates
from notification_service.watch import Streams
from servicekit import database, guard, listening, rpc, schema, tasks, telemetry
from servicekit import metrics as process
from servicekit.configfile import InvalidConfigError
from servicekit.database import Pool
from servicekit.entrance import open_entrance
from servicekit.health import Health
from servicekit.rpc import Door
from servicekit.settings import variable
from servicekit.tasks import Background
from tidings.client import Batch, CursorStore, UserFeed, connect
from tidings.client.feed import Start
from tidings.notifications.v1 import (
    digests_pb2,
    digests_pb2_grpc,
    endpoints_pb2,
    endpoints_pb2_grpc,
    in_app_pb2,
    in_app_pb2_grpc,
    notifications_pb2,
    notifications_pb2_grpc,
    preferences_pb2,
    preferences_pb2_grpc,
    sends_pb2,
    sends_pb2_grpc,
    templates_pb2,
    templates_pb2_grpc,
)
from tidings.users.v1 import users_pb2, users_pb2_grpc

if TYPE_CHECKING:
    from notification_service import web

NAME = "tidings-notifications"
_SERVICES = tuple(
    file.services_by_name[name]
    for file, name in (
        (notifications_pb2.DESCRIPTOR, "NotificationService"),
        (in_app_pb2.DESCRIPTOR, "InAppService"),
        (endpoints_pb2.DESCRIPTOR, "EndpointService"),
        (templates_pb2.DESCRIPTOR, "TemplateService"),
        (preferences_pb2.DESCRIPTOR, "PreferenceService"),
        (sends_pb2.DESCRIPTOR, "SendService"),
        (digests_pb2.DESCRIPTOR, "DigestService"),
    )
)

# Shards take turns: the inbox's row is locked by one transaction at a time.
_INBOX_CONNECTIONS = 4
# The copy of the users, its lease, the sender, retention, and one to spare.
_SEND_CONNECTIONS = 5
# One lease per lane, the recorder, and one to spare.
_DISPATCH_CONNECTIONS = 4
_GET_FEED_TIMEOUT = 5.0
# Users that the copy of them takes at a time.
_COPIED = 500
_ASK = 10.0  # seconds between looks at the database for the metrics
# A process that is paused must not hold up who changes parked deliveries elsewhere.
_QUERY_SESSION: dict[str, str | int] = {"statement_timeout": "10s", "idle_in_transaction_session_timeout": "5s"}


@dataclass(frozen=True, slots=True)
class Files:
    """What the operator's files say."""

    composer: Composer
    endpoints: tuple[Destination, ...]
    sending: Sending
    categories: Categories
    # None if mails have no links to unsubscribe by.
    links: Links | None


def read(settings: NotificationServiceSettings) -> Files:
    """Reads the operator's files; the composer knows no endpoints yet. Raises InvalidConfigError."""
    told = rules.read(settings.rules_file)
    decidable = categories.load(settings.categories_file)
    categories.check_digests(decidable, told.digests.values())
    found = links.read(settings, decidable)
    composer = Composer(
        told.rules,
        Templates(settings.templates_dir),
        lanes.writers(settings.mail_from, ()),
        found.url if found else no_link,
        told.digests,
    )
    composer.check()
    return Files(
        composer,
        tuple(one.destination() for one in endpoints.load(settings.webhooks_file)),
        lanes.read(settings),
        decidable,
        found,
    )


async def serve(settings: NotificationServiceSettings, files: Files) -> int:
    """Runs the service until it is told to stop. Returns the exit code. Raises InvalidConfigError."""
    entrance = open_entrance(settings, rpc.methods(*_SERVICES))
    users = _users(settings)
    # Before anything else, so that an address that is taken is said at once.
    pages = listening.bound(settings.http_listen) if files.links else None
    if files.links and pages is None:
        return 1
    url = settings.database_url.get_secret_value()
    storing = database.pool(url, f"{NAME}-inbox", size=_INBOX_CONNECTIONS, **STORING_SESSION)
    queries = database.pool(url, f"{NAME}-queries", size=settings.query_connections, **_QUERY_SESSION)
    dispatch = database.pool(url, f"{NAME}-dispatch", size=_DISPATCH_CONNECTIONS, statement_timeout="10s")
    sending = database.pool(url, f"{NAME}-sends", size=_SEND_CONNECTIONS, **STORING_SESSION)
    default_sender = settings.mail_from == NotificationServiceSettings.model_fields["mail_from"].default
    notes = (*entrance.notes, *(["default-sender"] if default_sender else []))
    health = Health((one.full_name for one in _SERVICES), SCHEMA_REVISION, notes)
    async with rpc.open_door(entrance, health) as door:
        if door is None:
            return 1
        if not await door.unless_stopped(schema.wait(url, NAME, SCHEMA_REVISION, tell=health.wait_for)):
            return 0
        with telemetry.tracing(NAME), process.measuring(NAME, settings.metrics_address, metrics.INSTRUMENTS):
            async with storing, queries, dispatch, sending, users:
                served = _unsubscribing(settings, files, pages, queries)
                return await _serve(settings, door, files, storing, queries, dispatch, sending, users, served)


def _unsubscribing(
    settings: NotificationServiceSettings, files: Files, pages: socket.socket | None, queries: Pool
) -> web.Server | None:
    """What serves the links in mails; None if there are none."""
    if files.links is None or pages is None:
        return None
    # Takes a twentieth of a service's start, for nothing where mails have no links.
    from notification_service import web
    from notification_service.unsubscribe import Switches

    application = web.application(files.links, Switches(queries, files.categories), settings.mail_from)
    return web.Server(application, pages, grace=settings.drain_time)


async def reset_cursor(settings: NotificationServiceSettings, to: reset.Start, confirm: Callable[[str], bool]) -> int:
    """Sets the cursor to another place of the user feed. Returns the exit code. Raises InvalidConfigError."""
    url = settings.database_url.get_secret_value()
    try:
        async with (
            _users(settings) as users,
            await database.connect(url, f"{NAME}-reset", **_QUERY_SESSION) as connection,
        ):
            after = await reset.reset(connection, users, to, confirm)
    except (reset.ResetError, psycopg.Error) as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        return 1
    print(f"the cursor is at position {after.position}; a service that runs goes on from there within seconds")
    return 0


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
    door: Door,
    files: Files,
    storing: Pool,
    queries: Pool,
    dispatch: Pool,
    sending: Pool,
    users: grpc.aio.Channel,
    pages: web.Server | None,
) -> int:
    background = Background(overdue_after=settings.overdue_after, stuck_after=settings.stuck_after)
    tail = Tail(queries, settings.poll_interval)
    streams = Streams(
        queries,
        tail,
        max_streams=settings.max_streams,
        max_streams_per_caller=settings.max_streams_per_caller,
        max_stream_age=settings.max_stream_age,
        reconnect_spread=settings.reconnect_spread,
    )
    known = Endpoints(files.endpoints, queries, metrics.endpoint_gone)
    metrics.ENDPOINTS.read = known.standing
    webhook = lanes.webhook(settings, files.sending, known)
    sent_by = lanes.make(settings, files.sending, known, webhook)
    composer = replace(files.composer, writers=lanes.writers(settings.mail_from, known))
    dispatcher = Dispatcher(
        dispatch,
        sent_by,
        files.categories,
        lease=settings.lease,
        poll_interval=settings.poll_interval,
    )

    def stored() -> None:
        dispatcher.wake()
        tail.hint()

    def open_feed(cursor: CursorStore, shard: tuple[int, int], start: Start) -> AsyncGenerator[Batch, None]:
        feed = UserFeed(
            users,
            cursor=cursor,
            start=start,
            # A whole feed leaves no position out, which the client then looks at.
            shard=shard if shard[1] > 1 else None,
            include_previous=True,
            bookmark_interval=settings.feed_bookmark_interval,
            progress=True,
        )
        return aiter(feed)

    async def head() -> tuple[uuid.UUID, int]:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(users)
        feed = await stub.GetFeed(users_pb2.GetFeedRequest(), timeout=_GET_FEED_TIMEOUT)
        return uuid.UUID(feed.log_id), feed.head_position

    async def log_id() -> uuid.UUID:
        return (await head())[0]

    def open_snapshot(cursor: CursorStore) -> AsyncGenerator[Batch, None]:
        interval = settings.feed_bookmark_interval
        return aiter(
            UserFeed(
                users, cursor=cursor, start="snapshot", bookmark_interval=interval, max_batch=_COPIED, progress=True
            )
        )

    subscriber = Subscriber(
        settings.database_url.get_secret_value(),
        storing,
        Inbox(composer, stored),
        Source(open_feed, log_id),
        shards=settings.shards,
        lease=settings.shard_lease,
        patience=settings.standby_patience,
    )
    explainer = Explainer(
        queries, users, composer.rules, files.categories, dispatcher.away, lambda: frozenset(known.paused_targets())
    )
    sender = Sender(
        sending,
        composer,
        stored,
        turn=settings.shard_lease,
        poll_interval=settings.poll_interval,
    )
    recipients = Recipients(sending, RecipientsSource(open_snapshot, log_id), sender.wake, lease=settings.shard_lease)
    digester = Digester(storing, composer, stored, lease=settings.lease, poll_interval=settings.poll_interval)
    rpc.add_tools(door, *_SERVICES)
    for add, servicer in (
        (
            notifications_pb2_grpc.add_NotificationServiceServicer_to_server,
            NotificationService(queries, streams, explainer, dispatcher.wake),
        ),
        (in_app_pb2_grpc.add_InAppServiceServicer_to_server, InAppService(queries, tail.hint)),
        (
            endpoints_pb2_grpc.add_EndpointServiceServicer_to_server,
            EndpointService(queries, known, webhook, dispatcher.wake, settings.webhook_networks_allowed),
        ),
        (
            templates_pb2_grpc.add_TemplateServiceServicer_to_server,
            TemplateService(
                composer,
                sent_by[EMAIL].routes.standing()[0].channel,
                settings.mail_from,
                send_timeout=sent_by[EMAIL].policy.timeout,
            ),
        ),
        (preferences_pb2_grpc.add_PreferenceServiceServicer_to_server, PreferenceService(queries, files.categories)),
        (sends_pb2_grpc.add_SendServiceServicer_to_server, SendService(queries, composer, head, sender.wake)),
        (digests_pb2_grpc.add_DigestServiceServicer_to_server, DigestService(queries, digester.flush)),
    ):
        guard.add(door.server, door.entrance.source, add, servicer)

    async def knowing(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # What is not read yet looks as if it were deleted.
        with tasks.resting():
            await known.loaded()
        await loop()

    async def not_ready() -> str:
        door.health.schema_found, problem = await schema.look(queries, SCHEMA_REVISION)
        return "; ".join(filter(None, (problem, subscriber.refused)))

    async def drain() -> None:
        sender.drain()
        await asyncio.gather(
            recipients.drain(),
            streams.drain(settings.drain_time),
            subscriber.drain(settings.drain_time),
            dispatcher.drain(settings.drain_time),
            *([pages.drain()] if pages else ()),
        )

    # Each with the longest time until it goes round again.
    for loop, name, every in (
        (knowing(subscriber.run), "subscriber", LONGEST_PAUSE),
        *((knowing(partial(dispatcher.run_lane, name)), name, settings.poll_interval) for name in sent_by),
        (dispatcher.record(), "recorder", 0.0),
        (knowing(dispatcher.tidy), "tidier", settings.lease / 2),
        (tail.run(), "tail", settings.poll_interval),
        (known.run(settings.poll_interval), "endpoints", settings.poll_interval),
        (recipients.run(), "recipients", LONGEST_PAUSE),
        (knowing(sender.run), "sender", settings.poll_interval),
        (digester.run(), "digester", settings.poll_interval),
        (retention.run(sending, settings.notifications_kept, settings.deleted_kept), "retention", retention.INTERVAL),
        (template_reload.follow(composer.templates, composer.needs), "templates", template_reload.INTERVAL),
    ):
        background.start(loop, name, every=every)
    if files.links and pages:
        background.start(files.links.keys.follow(), files.links.keys.name)
        background.start(pages.run(), "pages")
    if process.seen():
        process.read_pools(queries, dispatch, storing, sending)
        metrics.TEMPLATES_REFUSED.read_one(lambda: len(composer.templates.refused.splitlines()))
        background.start(_measure(queries), "metrics")
    return await rpc.serve(door, background, not_ready=not_ready, drain=drain, grace=settings.grace)


async def _measure(pool: Pool) -> None:
    """A background loop: asks the database for what it alone knows."""
    deliveries, sending, digests = metrics.Deliveries(), metrics.Sends(), metrics.Digests()
    copied = metrics.Copy()

    async def look() -> None:
        async with pool.connection() as connection:
            deliveries.found(await standing.of_channels(connection), await standing.position(connection))
            sending.found(await sends.standing(connection))
            digests.found(*await digest_store.standing(connection))
            copied.found(await recipient_store.silence(connection))

    await process.refresh(look, _ASK)
