"""The composition root: makes every part of the user service, joins them, and takes them apart in order."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from servicekit import database, guard, logs, rpc, schema, telemetry
from servicekit import metrics as process
from servicekit.database import Pool
from servicekit.entrance import open_entrance
from servicekit.health import Health
from servicekit.rpc import Door
from servicekit.tasks import Background
from tidings.users.v1 import users_pb2, users_pb2_grpc
from user_service import janitor, metrics, reads, retention, sealer
from user_service.api import RAW_RESPONSES, UserService
from user_service.imports import Imports
from user_service.lag import Lag
from user_service.messages import Messages
from user_service.settings import UserServiceSettings
from user_service.tables import SCHEMA_REVISION
from user_service.tailer import Tailer
from user_service.turns import Turns
from user_service.watch import Streams
from user_service.window import Window
from user_service.writer import Writer

log = logs.get(__name__)

NAME = "tidings-users"
# Pages of the log are few statements run very often, always by an index: planned once, and not by how little there was
# at that time.
_HISTORY_SESSION: dict[str, str | int] = {
    "statement_timeout": "30s",
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
}
_ASK = 10.0  # seconds between looks at the database for the metrics
_SERVICE = users_pb2.DESCRIPTOR.services_by_name["UserService"]


async def serve(settings: UserServiceSettings) -> int:
    """Runs the service until it is told to stop. Returns the exit code. Raises InvalidConfigError."""
    entrance = open_entrance(settings, rpc.methods(_SERVICE))
    url = settings.database_url.get_secret_value()
    queries = database.pool(url, f"{NAME}-queries", size=settings.query_connections, statement_timeout="10s")
    history = database.pool(url, f"{NAME}-history", size=settings.catch_up_readers, **_HISTORY_SESSION)
    health = Health((_SERVICE.full_name,), SCHEMA_REVISION, entrance.notes)
    async with rpc.open_door(entrance, health) as door:
        if door is None:
            return 1
        if not await door.unless_stopped(schema.wait(url, NAME, SCHEMA_REVISION, tell=health.wait_for)):
            return 0
        with telemetry.tracing(NAME), process.measuring(NAME, settings.metrics_address, metrics.INSTRUMENTS):
            async with queries, history:
                return await _serve(settings, door, url, queries, history)


async def _serve(settings: UserServiceSettings, door: Door, url: str, queries: Pool, history: Pool) -> int:
    background = Background(overdue_after=settings.overdue_after, stuck_after=settings.stuck_after)
    async with queries.connection() as connection:
        state = await reads.feed_state(connection)

    def callers_wait() -> bool:
        return not writer.is_idle

    window = Window(settings.window_bytes, callers_wait)
    window.reset(state.head, state.head_time)
    tailer = Tailer(url, window, settings.poll_interval)
    messages = Messages(
        state.log_id, history, window, readers=settings.catch_up_readers, cache_bytes=settings.page_cache_bytes
    )
    writer = Writer(
        url,
        tailer.committed,
        tailer.hint,
        batch_limit=settings.batch_limit,
        linger=settings.linger,
        queue_limit=settings.queue_limit,
        queue_limit_per_caller=settings.queue_limit_per_caller,
        deleted_kept=settings.deleted_kept,
        unknown_outcome_wait=settings.unknown_outcome_wait,
    )
    lag = Lag(queries, window)
    streams = Streams(
        queries,
        window,
        messages,
        Turns(callers_wait),
        lag,
        state,
        max_streams=settings.max_streams,
        max_streams_per_caller=settings.max_streams_per_caller,
        max_stream_age=settings.max_stream_age,
        reconnect_spread=settings.reconnect_spread,
    )
    imports = Imports(writer, max_imports=settings.max_imports)
    rpc.add_tools(door, _SERVICE)
    guard.add(
        door.server,
        door.entrance.source,
        users_pb2_grpc.add_UserServiceServicer_to_server,
        UserService(writer, queries, streams, imports),
        raw_responses=RAW_RESPONSES,
    )

    async def not_ready() -> str:
        door.health.schema_found, problem = await schema.look(queries, SCHEMA_REVISION)
        table = {
            problem: bool(problem),
            "the feed cannot be read": not tailer.read_ok,
            "the log has a hole": messages.broken,
        }
        return "; ".join(reason for reason, holds in table.items() if holds)

    async def drain() -> None:
        await asyncio.gather(streams.drain(settings.drain_time), imports.drain(settings.drain_time))

    # Each with the longest time until it goes round again; none for what only waits for others.
    for loop, name, every in (
        (writer.run(), "writer", 0.0),
        (tailer.run(), "tailer", settings.poll_interval),
        (tailer.listen(), "listener", None),
        (tailer.notify(), "notifier", None),
        (sealer.run(url, _rules(settings), settings.seal_interval), "sealer", settings.seal_interval),
        (
            retention.run(
                queries,
                timedelta(seconds=settings.events_kept),
                settings.events_kept_bytes,
                settings.retention_interval,
            ),
            "retention",
            settings.retention_interval,
        ),
        (janitor.run(queries, settings.answers_kept), "janitor", janitor.INTERVAL),
    ):
        background.start(loop, name, every=every)
    if process.seen():
        _measure(window, writer, queries, history)
        background.start(lag.follow(), "lag")
        background.start(process.refresh(lag.ask, _ASK), "metrics")
    return await rpc.serve(
        door,
        background,
        not_ready=not_ready,
        drain=drain,
        grace=settings.grace,
        finish=lambda: writer.close(settings.unknown_outcome_wait),
    )


def _measure(window: Window, writer: Writer, *pools: Pool) -> None:
    """Has looked at what is now."""
    process.read_pools(*pools)
    metrics.QUEUE.read = lambda: [((lane,), items) for lane, items in writer.waiting.items()]
    metrics.HEAD.read_one(lambda: window.head)
    metrics.WINDOW_EVENTS.read_one(lambda: window.head + 1 - window.first)
    metrics.WINDOW_BYTES.read_one(lambda: window.bytes)


def _rules(settings: UserServiceSettings) -> sealer.Rules:
    # Only what is sealed is removed: nothing may be loose for longer than it is kept.
    span = timedelta(seconds=min(settings.segment_span, settings.events_kept))
    return sealer.Rules(settings.segment_events, settings.unsealed_events, span)
