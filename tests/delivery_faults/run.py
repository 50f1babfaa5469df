"""One run: start everything, let the storm rage, let the servers behave and the work end, and gather what is left."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from notification_service.domain import Operation as OperationKind
from notification_service.domain import Result, State
from tests.delivery_faults import evidence, site
from tests.delivery_faults.evidence import KILLED, Change, Evidence
from tests.delivery_faults.kinds import DISCARDED, POSTGRES_FAULTS, REPLAYED, REPLICA_FAULTS
from tests.delivery_faults.site import BOUNDS, Site, note
from tests.faultrun.command import Settings
from tests.faults.plan import Step, rounds
from tests.faults.run import Part, part
from tests.faults.site import GivenUpError, Member, fetch
from tests.proof import records
from tidings.notifications.v1 import notifications_pb2, notifications_pb2_grpc
from tidings.users.v1 import users_pb2, users_pb2_grpc

# How long what is left at the end may take. A broken service may never end it, which is soon seen.
_LAST, _LAST_IF_BROKEN = 120.0, 20.0
_CALL_TIMEOUT = 5.0
_BY_HAND = "by hand"


def _patience(settings: Settings) -> float:
    """How long the end of the run may take."""
    return _LAST_IF_BROKEN if settings.broken else _LAST


async def run(settings: Settings) -> Evidence:
    """Runs. What the processes wrote stays in the directory."""
    settings.directory.mkdir(parents=True, exist_ok=True)
    async with (
        site.opened(settings.replicas, settings.seed, settings.broken) as made,
        part(
            "tests.faults.writers",
            "--addresses", made.users.process.address,
            "--directory", str(settings.directory),
            "--seed", str(settings.seed),
            "--callers", str(settings.callers),
            "--pause", "0.3",
            "--large", "0",
        ) as writers,
    ):  # fmt: skip
        early = ""
        try:
            await _storm(settings, made)
            await _end(settings, made, writers)
        except (GivenUpError, TimeoutError) as error:
            early = str(error) or "a part of the run did not answer"
        found = await _gather(made, settings.directory)
        found.notes |= _notes(settings, made) | ({"ended early": early} if early else {})
        return found


# The storm


async def _storm(settings: Settings, made: Site) -> None:
    settings.say("storm")
    begun = time.monotonic()

    def rages(kinds: dict[str, object]) -> bool:
        spent = time.monotonic() - begun
        hits = Counter(deed.kind for deed in made.deeds if deed.hit)
        fewest = min(hits[kind] for kind in kinds)
        return spent < settings.seconds or (spent < 2 * settings.seconds and fewest < settings.hits)

    of_replicas = rounds(tuple(REPLICA_FAULTS), f"{settings.seed} replicas", (0.2, 1.0))
    lanes: list[Awaitable[None]] = [
        _lane(made, replica, of_replicas, lambda: rages(dict(REPLICA_FAULTS))) for replica in made.replicas
    ]
    of_postgres = rounds(tuple(POSTGRES_FAULTS), f"{settings.seed} postgres", (3.0, 5.0))
    lanes.append(_postgres_lane(made, of_postgres, lambda: rages(dict(POSTGRES_FAULTS))))
    tasks = [asyncio.ensure_future(lane) for lane in lanes]
    operator = asyncio.create_task(_operate(made, random.Random(f"{settings.seed} operator")))
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in (*tasks, operator):
            task.cancel()
        await asyncio.gather(*tasks, operator, return_exceptions=True)


async def _lane(made: Site, replica: Member, steps: Iterator[Step], rages: Callable[[], bool]) -> None:
    while rages():
        step = next(steps)
        async with replica.lock:
            await replica.revive()
            await REPLICA_FAULTS[step.kind](made, replica, random.Random(step.seed), step.kind)
        await asyncio.sleep(step.rest)


async def _postgres_lane(made: Site, steps: Iterator[Step], rages: Callable[[], bool]) -> None:
    while rages():
        step = next(steps)
        await asyncio.sleep(step.rest)
        await POSTGRES_FAULTS[step.kind](made, random.Random(step.seed), step.kind)


async def _operate(made: Site, chance: random.Random) -> None:
    """An operator who looks at what is parked, again and again."""
    while True:
        await asyncio.sleep(chance.uniform(0.2, 0.6))
        parked = [str(row[0]) for row in await made.fetch(f"SELECT id FROM deliveries WHERE state = {State.PARKED:d}")]
        if not parked:
            continue
        some = chance.sample(parked, min(len(parked), chance.randint(1, 20)))
        if chance.random() < 0.5:
            await _by_hand(made, chance, DISCARDED, some[: 1 + len(some) // 4])
        else:
            await _by_hand(made, chance, REPLAYED, some if chance.random() < 0.7 else [])


async def _by_hand(made: Site, chance: random.Random, kind: str, ids: list[str]) -> None:
    """Replays or discards; without ids all that is parked. One that has changed meanwhile keeps all from it."""
    at = time.time()
    async with made.channel(chance) as channel:
        stub: notifications_pb2_grpc.NotificationServiceAsyncStub = notifications_pb2_grpc.NotificationServiceStub(
            channel
        )
        which: dict[str, Any] = {"ids": ids} if ids else {"filter": {}}
        try:
            if kind == DISCARDED:
                discard = notifications_pb2.DiscardDeliveriesRequest(reason=_BY_HAND, **which)
                count = (await stub.DiscardDeliveries(discard, timeout=_CALL_TIMEOUT)).discarded
            else:
                replay = notifications_pb2.ReplayDeliveriesRequest(reason=_BY_HAND, **which)
                count = (await stub.ReplayDeliveries(replay, timeout=_CALL_TIMEOUT)).replayed
        except grpc.aio.AioRpcError:
            return
    note(made, kind, _BY_HAND, at, hit=count > 0)


# The end


async def _end(settings: Settings, made: Site, writers: Part) -> None:
    settings.say("the servers behave; every change is settled")
    made.behave()
    await made.calm()
    await writers.ask("stop")
    assert await writers.line(_patience(settings)) == "settled"
    [[head]] = await fetch(made.users_database, "SELECT head_position FROM feed")
    settings.say("what is pending is delivered")
    chance = random.Random(f"{settings.seed} end")
    deadline = time.monotonic() + _patience(settings)
    while (left := await _left(made, int(str(head)))) and time.monotonic() < deadline:
        # What is parked holds back what is behind it.
        if left.holding:
            await _by_hand(made, chance, REPLAYED, left.holding)
        await asyncio.sleep(0.5)


@dataclass(frozen=True, slots=True)
class _Left:
    """What has not ended: how much, and parked deliveries of which others wait."""

    pending: int
    holding: list[str]
    behind: bool

    def __bool__(self) -> bool:
        return self.behind or self.pending > 0


async def _left(made: Site, head: int) -> _Left:
    [[pending]] = await made.fetch(f"SELECT count(*) FROM deliveries WHERE state = {State.PENDING:d}")
    holding = await made.fetch(
        "SELECT id FROM deliveries WHERE state = %s AND channel = ANY (%s) LIMIT 1000",
        int(State.PARKED),
        list(BOUNDS.parked_holds),
    )
    return _Left(int(str(pending)), [str(row[0]) for row in holding], await _position(made) < head)


async def _position(made: Site) -> int:
    """How far the feed is processed."""
    async with made.channel(random.Random()) as channel:
        stub: notifications_pb2_grpc.NotificationServiceAsyncStub = notifications_pb2_grpc.NotificationServiceStub(
            channel
        )
        try:
            return (await stub.GetInbox(notifications_pb2.GetInboxRequest(), timeout=_CALL_TIMEOUT)).position
        except grpc.aio.AioRpcError:
            return 0


# What is left


async def _gather(made: Site, directory: Path) -> Evidence:
    shutil.copy(made.postgres.log_path, directory / "postgres.log")
    found = Evidence(BOUNDS, made.endpoints)
    while not found.events:
        try:
            found.events = [event async for event in _feed(made)]
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.5)
    found.changes = list(_changes(directory))
    found.notifications = [
        evidence.Notification(str(id_), int(str(position)), str(event), int(str(at)), str(user), str(rule))
        for id_, position, event, at, user, rule in await made.fetch(
            "SELECT id, position, event_id, event_position, user_id, rule FROM notifications"
        )
    ]
    found.deliveries = [
        evidence.Delivery(
            str(id_), int(str(position)), str(notification), str(user), str(channel), str(target),
            State(int(str(state))).name, str(reason), _seconds(end), str(key), int(str(tries)),
        )
        for id_, position, notification, user, channel, target, state, reason, end, key, tries in await made.fetch(
            "SELECT id, position, notification_id, user_id, channel, target, state, end_reason,"
            " extract(epoch FROM end_time), idempotency_key, tries FROM deliveries"
        )
    ]  # fmt: skip
    found.attempts = [
        evidence.Attempt(
            str(delivery),
            int(str(number)),
            Result(int(str(outcome))).name,
            int(str(code)),
            _seconds(start),
            _seconds(end),
        )
        for delivery, number, outcome, code, start, end in await made.fetch(
            "SELECT delivery_id, number, outcome, code, extract(epoch FROM start_time), extract(epoch FROM end_time)"
            " FROM attempts"
        )
    ]
    found.operations = [
        evidence.Operation(str(delivery), OperationKind(int(str(kind))).name, _seconds(at))
        for delivery, kind, at in await made.fetch(
            "SELECT delivery_id, kind, extract(epoch FROM time) FROM delivery_operations"
        )
    ]
    found.received = [one for server in made.servers for one in server.received]
    found.deeds = made.deeds + [
        evidence.Deed("replica ended by itself", KILLED, at - 0.5, at, hit=False)
        for replica in made.replicas
        for at in replica.deaths
    ]
    for mail in made.mails:
        found.troubles.update({str(trouble): count for trouble, count in (mail.greetings.met + mail.mails.met).items()})
    for hook in made.hooks:
        found.troubles.update({str(trouble): count for trouble, count in hook.calls.met.items()})
    return found


def _changes(directory: Path) -> Iterator[Change]:
    """What the writers were answered, but for requests that only validate."""
    written = list(records.read(directory))
    idle = {one.op for one in written if isinstance(one, records.Intent) and not one.stores}
    for one in written:
        if isinstance(one, records.Outcome) and one.result == "done" and one.op not in idle:
            yield from (Change(user.id, user.version) for user in one.users)


def _seconds(time_: object) -> float:
    return float(str(time_)) if time_ is not None else 0.0


async def _feed(made: Site) -> AsyncIterator[evidence.Event]:
    """All events, read anew."""
    [[head]] = await fetch(made.users_database, "SELECT head_position FROM feed")
    async with grpc.aio.insecure_channel(made.users.process.address) as channel:
        stub: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        request = users_pb2.WatchUsersRequest(earliest={}, include_previous=True)
        stream = stub.WatchUsers(request)
        position = 0
        while position < int(str(head)):
            message = await stream.read()
            assert isinstance(message, users_pb2.WatchUsersResponse)
            position = message.position
            for event in message.events:
                yield evidence.Event(
                    event.position, event.id, users_pb2.UserEvent.Type.Name(event.type), event.user.id,
                    event.user.version, event.user.email, event.previous.email, frozenset(event.changed_fields),
                )  # fmt: skip
        stream.cancel()


def _notes(settings: Settings, made: Site) -> dict[str, object]:
    errors = [
        record
        for replica in made.replicas
        for record in replica.process.records
        if record.get("level") in ("error", "critical") and "ExecuteBatchError" not in record["event"]
    ]
    (settings.directory / "errors.json").write_text(json.dumps(errors, indent=1))
    return {
        "errors logged by the service": len(errors),
        "replicas that ended by themselves": sum(len(replica.deaths) for replica in made.replicas),
    }
