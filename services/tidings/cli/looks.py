"""What one look at a service tells: its health by every name, and what it says with it of its schema, clock and
settings. Tables say in words what is wrong and what to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT = 5.0
_SERVING = health_pb2.HealthCheckResponse.SERVING

# Clocks that differ by less are as good as any; seconds.
_CLOCK_TOLERANCE = 5.0


class State(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    ATTENTION = "attention"
    ILL = "ill"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look has found, and what to do about it."""

    check: str
    state: State
    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """A service to look at: its name for people, that of its API, and where it is."""

    name: str
    api: str
    address: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What a service has said: whether it is SERVING by name, None where it knows no such name, and facts. `ahead` is
    by how much its clock is ahead of this machine's, `unsure` how far that may be wrong; seconds.
    """

    service: Service
    serving: Mapping[str, bool | None]
    facts: Mapping[str, str]
    ahead: float = 0.0
    unsure: float = 0.0


# In the order in which they are told: of several that are off, the first says the most. With what it means.
_NAMES = {
    "liveness": "hangs",
    "startup": "has not started",
    "balancing": "is stopping",
    "readiness": "is not ready",
}

# What to do, by words of the reason, the first that it has.
_DATABASE = "bring the database back; the service's log says what it meets there"
_ADVICE = {
    "the database": _DATABASE,
    "the feed cannot be read": _DATABASE,
    "schema": "run the migrations: `python -m migrations upgrade all`; `... current all` says where the databases are",
    "hole": "committed changes are missing from the database: docs/operations.md says what can be done",
    "stuck": "restart it: its liveness probe should",
    "go round": "something holds it up: look for locks in pg_stat_activity; it goes on by itself, or gets stuck",
    "cannot be followed": "its log says why; `python -m notification_service reset-cursor --help` lets it go on",
    "let this one in": "give it a token that the user service knows: TIDINGS_NOTIFICATIONS_USERS_TOKEN_FILE",
    "stopping": "wait for its successor",
}
_LOG = "its log says what it waits for: its database, the schema, or a loop that died"

# What settings say that are only right on one's own machine, and what to do before others come in.
_NOTES = {
    "no-callers": ("everybody may call, and nobody has a name", "set ..._CALLERS_FILE"),
    "no-tls": ("it speaks without TLS", "set ..._TLS_CERTIFICATE_FILE and ..._TLS_KEY_FILE, unless a mesh encrypts"),
    "no-telemetry": ("no traces or metrics are exported", "set OTEL_EXPORTER_OTLP_ENDPOINT"),
    "default-sender": ("mail comes from a made-up address", "set TIDINGS_NOTIFICATIONS_MAIL_FROM"),
}


async def look(service: Service, channel: grpc.aio.Channel) -> Seen | Finding:
    """Asks a service; a finding if it cannot be asked."""
    stub: Any = health_pb2_grpc.HealthStub(channel)

    async def ask(name: str) -> tuple[bool | None, dict[str, str]]:
        call = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=_TIMEOUT)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None, {}
            raise
        told = {str(key): str(value) for key, value in await call.trailing_metadata() or ()}
        return answer.status == _SERVING, told

    try:
        began = datetime.now(UTC)
        serving, facts = await ask("readiness")
        ended = datetime.now(UTC)
        others = ("liveness", "startup", "balancing", service.api)
        answers = await asyncio.gather(*(ask(name) for name in others))
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            message = f"cannot be reached at {service.address}: {error.details()}"
            advice = "start it (`make run`), or give its address; --ca if it has TLS"
            return Finding(service.name, State.ILL, message, advice)
        message = f"what answers at {service.address} is another service: {error.details()}"
        return Finding(service.name, State.ILL, message, "give the right address")
    said = {"readiness": serving, **{name: answer for name, (answer, _) in zip(others, answers, strict=True)}}
    if said[service.api] is None:
        message = f"what answers at {service.address} is another service"
        return Finding(service.name, State.ILL, message, "give the right address")
    return Seen(service, said, facts, *_clock(facts.get("tidings-time", ""), began, ended))


def _clock(told: str, began: datetime, ended: datetime) -> tuple[float, float]:
    try:
        time = datetime.fromisoformat(told)
    except ValueError:
        return 0.0, 0.0
    half = (ended - began) / 2
    return (time - (began + half)).total_seconds(), half.total_seconds()


def findings(seen: Seen) -> Iterator[Finding]:
    """What a service's answers come to; the first is about its health."""
    yield _health(seen)
    yield from _off_clock(seen)
    yield from _settings(seen)


def _health(seen: Seen) -> Finding:
    service, where = seen.service, f"at {seen.service.address}"
    off = next((name for name in _NAMES if seen.serving[name] is False), None)
    if off is None:
        schema = seen.facts.get("tidings-schema", "")
        with_schema = f", on schema {schema}" if schema else ""
        return Finding(service.name, State.OK, f"ready {where}{with_schema}")
    reason = seen.facts.get("tidings-reason", "")
    advice = next((what for word, what in _ADVICE.items() if word in reason), _LOG)
    message = f"runs {where} but {_NAMES[off]}" + (f": {reason}" if reason else "")
    return Finding(service.name, State.ILL, message, advice)


def _off_clock(seen: Seen) -> Iterator[Finding]:
    if abs(seen.ahead) > _CLOCK_TOLERANCE + seen.unsure:
        side = "ahead of" if seen.ahead > 0 else "behind"
        message = f"the clock of the {seen.service.name} is {abs(seen.ahead):.0f} s {side} this machine's"
        advice = "synchronise both: certificates, signatures of webhooks and what is shown as late go by them"
        yield Finding("clock", State.ATTENTION, message, advice)


def _settings(seen: Seen) -> Iterator[Finding]:
    given = seen.facts.get("tidings-notes", "").split(",")
    notes = {note: _NOTES[note] for note in _NOTES if note in given}
    if not notes:
        return
    check = f"settings of the {seen.service.name}"
    if "local" in given:
        words = "; ".join(words for words, _ in notes.values())
        yield Finding(check, State.OK, f"right for this machine alone: {words}")
        return
    for words, advice in notes.values():
        yield Finding(check, State.ATTENTION, words, advice)
