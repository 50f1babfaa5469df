"""What a server tells of itself by grpc.health.v1, and why.

| name | SERVING means |
| --- | --- |
| `liveness` | the process answers, and no loop of it is stuck |
| `startup` | the schema is there and calls are taken |
| `balancing` | calls are taken, and it has not begun to stop |
| `readiness`, `""`, each service's own | callers should be sent here |

The reason for a NOT_SERVING is in the log, and in the trailing metadata of a Check, with what `tidings doctor`
compares: the time here, the schema, and what of the settings is only right on one's own machine. Everybody may ask, so
these tell nothing of the inside: no addresses, and no words of a database's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import logs
from servicekit.tasks import Background

log = logs.get(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_STARTING = "starting"
_STOPPING = "stopping"

# A look that comes later than it should by so much was not late by itself: the process did not run. Seconds.
_PAUSED = 1.0

# Seconds between looks while callers should not be sent here: first, and at most.
_AT_ONCE, _SOON = 0.01, 0.2


class Health:
    """Why each name is not SERVING; empty if it is. It begins alive and not started. `services` are their full
    names.
    """

    def __init__(self, services: Iterable[str], schema_required: str, notes: Iterable[str] = ()) -> None:
        self._ready_names = ("", "readiness", *services)
        self._why = dict.fromkeys(("startup", "balancing", *self._ready_names), _STARTING) | {"liveness": ""}
        self._closed = False
        self._was_ready = False
        self.ended = False
        self._notes = tuple(notes)
        # Replaced and set at each change.
        self._changed = asyncio.Event()
        self._schema_required = schema_required
        # The revision that was last seen.
        self.schema_found = ""
        self.servicer = _Servicer(self)

    def why(self, name: str) -> str | None:
        """Why a name is not SERVING; empty if it is, None if there is no such name."""
        return self._why.get(name)

    @property
    def is_ready(self) -> bool:
        """Whether callers should be sent here."""
        return not self._why["readiness"]

    async def changed(self) -> None:
        """Returns at the next change."""
        await self._changed.wait()

    def _set(self, reason: str, *names: str) -> bool:
        changed = [name for name in names if self._why[name] != reason]
        if changed:
            self._why.update(dict.fromkeys(changed, reason))
            event, self._changed = self._changed, asyncio.Event()
            event.set()
        return bool(changed)

    def wait_for(self, reason: str) -> None:
        """Says what it waits for before it starts."""
        self._set(reason, "startup", "balancing", *self._ready_names)

    def started(self) -> None:
        """Calls are taken; not ready yet."""
        self._set("", "startup", "balancing")

    def set_ready(self, reason: str) -> None:
        """Tells whether callers should be sent here, by the reason why not. After `close` they should not."""
        if self._closed:
            return
        before = self._why["readiness"]
        if self._set(reason, *self._ready_names):
            if reason:
                # At the start it is only what is not done yet.
                (log.warning if self._was_ready else log.info)("not ready", reason=reason)
            self._was_ready = self._was_ready or not reason
            if bool(reason) != bool(before):
                log.info("readiness changed", ready=not reason)

    def set_alive(self, reason: str) -> None:
        """Tells whether this process should go on, by the reason why not."""
        if self._set(reason, "liveness") and reason:
            log.error("not alive", reason=reason)

    def close(self) -> None:
        """Begins to stop: no callers any more."""
        was_ready, self._closed = not self._why["readiness"], True
        self._set(_STOPPING, "balancing", *self._ready_names)
        if was_ready:
            log.info("readiness changed", ready=False)

    def end(self) -> None:
        """Ends the calls that watch: they would hold up a server that stops."""
        self.ended = True
        self._changed.set()

    async def follow(
        self, not_ready: Callable[[], Awaitable[str]], background: Background, interval: float = 2.0
    ) -> None:
        """A background loop: readiness follows the loops and `not_ready`, which says why callers should not be sent
        here, is bounded in time and may raise; liveness follows the loops.
        """
        loop = asyncio.get_running_loop()
        ran = due = loop.time()
        soon = _AT_ONCE
        while True:
            # A pause may have begun right after it last ran: all that time is forgiven.
            if loop.time() - due > _PAUSED:
                background.forgive(loop.time() - ran)
            reasons = [f"the loop {name} does not go round" for name in background.overdue()]
            if background.failure:
                reasons.append(f"the loop {background.failure} died")
            # From here on too a pause of the process is not the fault of what it waits for.
            ran = loop.time()
            due = ran + interval
            reasons.append(await _look(not_ready, interval))
            if loop.time() - due > _PAUSED:
                continue
            self.set_ready("; ".join(filter(None, reasons)))
            self.set_alive("; ".join(f"the loop {name} is stuck" for name in background.stuck()))
            # Until the next success look again soon, the first time at once: whoever starts the process waits for it.
            soon = min(2 * soon, _SOON) if any(reasons) else _AT_ONCE
            pause = soon if any(reasons) else interval
            ran = loop.time()
            due = ran + pause
            await asyncio.sleep(pause)

    def told(self, name: str) -> tuple[tuple[str, str], ...]:
        """The trailing metadata of an answer about a name."""
        facts = {
            "tidings-reason": self._why.get(name) or "",
            "tidings-time": datetime.now(UTC).isoformat(),
            "tidings-schema-required": self._schema_required,
            "tidings-schema": self.schema_found,
            "tidings-notes": ",".join(self._notes),
        }
        return tuple((key, value.encode("ascii", "replace").decode()) for key, value in facts.items() if value)


async def _look(not_ready: Callable[[], Awaitable[str]], timeout: float) -> str:
    try:
        async with asyncio.timeout(timeout):
            return await not_ready()
    except TimeoutError:
        return "the database does not answer"
    except Exception as error:
        log.exception("a look at the readiness failed")
        return type(error).__name__


class _Servicer(health_pb2_grpc.HealthServicer):
    """Not the one of grpcio-health-checking: there a watcher that reads nothing can hold up every change."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def _status(self, name: str) -> int | None:
        why = self._health.why(name)
        return None if why is None else _NOT_SERVING if why else _SERVING

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such name")
        context.set_trailing_metadata(self._health.told(request.service))
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            status = self._status(request.service) or _UNKNOWN
            # What changed while the last was sent is looked at before anything is waited for.
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            elif self._health.ended:
                return
            else:
                await self._health.changed()
