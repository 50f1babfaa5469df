"""The dispatcher against a real Postgres and a real mail server: leases, fences, retries, parking, drain."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from notification_service.breaker import Breaker, Patience
from notification_service.channels import Channel, Message, Outcome
from notification_service.channels.email import EmailChannel
from notification_service.compose import Composer
from notification_service.dispatcher import Dispatcher, Lane
from notification_service.domain import EMAIL, TRIES_EXHAUSTED, Ended, Leased, Result, State
from notification_service.inbox import Inbox
from notification_service.retries import Policy, decide
from notification_service.routes import Providers, Route
from notification_service.store import feed, leases, outcomes, reads
from servicekit import database
from servicekit.database import Connection, Pool
from tests.harness import Action, Database, PostgresProxy, sql_contains
from tests.notifications.conftest import SENDER, Events, MailServer, batch, dispatching, eventually
from tidings.notifications.v1 import notifications_pb2

Attempt = notifications_pb2.Delivery.Attempt
FAST = Policy(tries=3, base=0.02, factor=2.0, cap=0.1, timeout=2.0)
PATIENCE = Patience(failures=5, pause=0.1, longest=0.4)


async def fill(connection: Connection, composer: Composer, events: Events, count: int) -> None:
    """Stores notifications of so many new users."""
    made = [events.created(f"user{number}") for number in range(count)]
    await Inbox(composer, lambda: None).store(connection, await feed.read_cursor(connection), batch(*made))


async def listed(connection: Connection) -> list[notifications_pb2.Delivery]:
    return [one.delivery for one in await reads.list_deliveries(connection, {}, 1 << 62, 10_000)]


async def lease(connection: Connection, most: int = 10, seconds: float = 30.0, tries: int = 8) -> list[Leased]:
    picked, _ = await leases.pick(connection, EMAIL, most, None, seconds=seconds, max_tries=tries, busy=[])
    return await leases.begin(connection, [(one, "smtp") for one in picked], max_age=3600.0)


def route(channel: Channel, name: str = "smtp", slots: int = 64) -> Route:
    return Route(name, channel, Breaker(PATIENCE), slots)


def delivered(leased: Leased) -> Ended:
    return Ended(leased.id, leased.number, Result.SUCCEEDED, 250, "OK", State.DELIVERED, 0.0)


def running(
    pool: Pool,
    *channels: Channel,
    slots: int = 8,
    policy: Policy = FAST,
    lease: float = 30.0,
    poll_interval: float = 0.05,
) -> AbstractAsyncContextManager[Dispatcher]:
    """A dispatcher at work."""
    routes = Providers([route(one, f"smtp{number}") for number, one in enumerate(channels)])
    return dispatching(pool, {EMAIL: Lane(routes, policy, slots)}, lease=lease, poll_interval=poll_interval)


class Scripted:
    """A channel that answers from a list and remembers what it carried; the last answer stays."""

    def __init__(self, *answers: Outcome, delay: float = 0.0) -> None:
        self.answers = list(answers)
        self.delay = delay
        self.sent: list[Message] = []
        self.now = 0
        self.most = 0
        self.closed = False

    async def send(self, message: Message) -> Outcome:
        self.sent.append(message)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.now -= 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    async def close(self) -> None:
        self.closed = True


OK = Outcome(Result.SUCCEEDED, 250, "OK")
LATER = Outcome(Result.FAILED, 451, "later")


async def test_what_a_paused_process_has_leased_is_not_sent_when_it_wakes(
    pool: Pool,
    connection: Connection,
    composer: Composer,
    events: Events,
    proxy: PostgresProxy,
    notifications_database: Database,
) -> None:
    await fill(connection, composer, events, 1)
    paused, other = Scripted(OK), Scripted(OK)
    policy = replace(FAST, timeout=0.2)
    async with database.pool(proxy.url(notifications_database), "paused", size=3) as held_up:
        fault = proxy.arm("paused", Action.HOLD_AFTER, sql_contains("INSERT INTO attempts"))
        async with running(held_up, paused, policy=policy, lease=0.5):
            # The attempt is begun, and the process learns of it only after another has made it.
            await fault.happened()
            async with running(pool, other, policy=policy, lease=0.5):
                await eventually(lambda: other.sent)
            fault.release()
            await fill(connection, composer, events, 1)
            await eventually(lambda: paused.sent)
    keys = [one.idempotency_key for one in (*other.sent, *paused.sent)]
    assert len(keys) == len(set(keys)) == 2
    first = (await listed(connection))[-1]
    assert [attempt.outcome for attempt in first.attempts] == [Attempt.UNKNOWN, Attempt.SUCCEEDED]


async def test_who_gives_back_late_takes_nothing_from_others(
    connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 1)
    late, _ = await leases.pick(connection, EMAIL, 1, None, seconds=0.0, max_tries=8, busy=[])
    [begun] = await lease(connection)
    await leases.give_back(connection, late)
    assert await lease(connection) == []
    assert await outcomes.record(connection, [delivered(begun)]) == {begun.id}


async def test_mail_arrives_once_each(
    pool: Pool, connection: Connection, composer: Composer, events: Events, mail: MailServer
) -> None:
    await fill(connection, composer, events, 200)
    channel = EmailChannel("127.0.0.1", mail.port, sender=SENDER, tls="off", timeout=2.0)
    async with running(pool, channel, slots=16):
        await eventually(lambda: len(mail.received) == 200)
    assert len({one.message["Message-ID"] for one in mail.received}) == 200
    assert len(mail.sessions) <= 16
    deliveries = await listed(connection)
    assert {one.idempotency_key for one in deliveries} == {one.message["Message-ID"] for one in mail.received}
    for one in deliveries:
        assert one.state == notifications_pb2.Delivery.DELIVERED
        assert [(attempt.number, attempt.outcome, attempt.code) for attempt in one.attempts] == [
            (1, Attempt.SUCCEEDED, 250)
        ]
        assert one.HasField("end_time")
        assert not one.HasField("next_attempt_time")


async def test_two_dispatchers_share_the_work(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 120)
    one, other = Scripted(OK, delay=0.005), Scripted(OK, delay=0.005)
    async with running(pool, one), running(pool, other):
        await eventually(lambda: len(one.sent) + len(other.sent) >= 120)
        await asyncio.sleep(0.1)
    keys = [message.idempotency_key for message in one.sent + other.sent]
    assert len(keys) == len(set(keys)) == 120
    assert one.sent
    assert other.sent
    assert max(one.most, other.most) <= 8
    assert one.closed


async def test_retries_then_success(pool: Pool, connection: Connection, composer: Composer, events: Events) -> None:
    await fill(connection, composer, events, 1)
    channel = Scripted(LATER, LATER, OK)
    async with running(pool, channel):
        await eventually(lambda: _in_state(connection, State.DELIVERED))
    (one,) = await listed(connection)
    assert [(attempt.number, attempt.outcome, attempt.detail) for attempt in one.attempts] == [
        (1, Attempt.FAILED, "later"),
        (2, Attempt.FAILED, "later"),
        (3, Attempt.SUCCEEDED, "OK"),
    ]
    assert len({message.idempotency_key for message in channel.sent}) == 1
    assert len({message.content for message in channel.sent}) == 1


async def _in_state(connection: Connection, state: State) -> bool:
    return all(one.state == int(state) for one in await listed(connection))


@pytest.mark.parametrize(
    ("answer", "attempts"), [(LATER, 3), (Outcome(Result.REFUSED, 550, "no such user"), 1)], ids=["last try", "refused"]
)
async def test_parking(
    pool: Pool, connection: Connection, composer: Composer, events: Events, answer: Outcome, attempts: int
) -> None:
    await fill(connection, composer, events, 1)
    channel = Scripted(answer)
    async with running(pool, channel):
        await eventually(lambda: _in_state(connection, State.PARKED))
        await asyncio.sleep(0.1)
    (one,) = await listed(connection)
    assert [attempt.detail for attempt in one.attempts] == [answer.detail] * attempts
    assert len(channel.sent) == attempts


async def test_an_attempt_is_bounded_in_time(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 1)
    async with running(pool, Scripted(OK, delay=60.0), policy=replace(FAST, tries=1, timeout=0.05)):
        await eventually(lambda: _in_state(connection, State.PARKED))
    (one,) = await listed(connection)
    assert one.attempts[0].detail == "no answer within 0.05 s"


async def test_a_channel_that_breaks_is_an_attempt_that_failed(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 1)

    class Broken(Scripted):
        async def send(self, message: Message) -> Outcome:
            raise KeyError("secret")

    async with running(pool, Broken(OK), policy=replace(FAST, tries=1)):
        await eventually(lambda: _in_state(connection, State.PARKED))
    (one,) = await listed(connection)
    assert one.attempts[0].detail == "internal error: KeyError"


async def test_a_lease_takes_no_more_than_asked_and_shows_the_attempt(
    connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 5)
    first = await lease(connection, 3)
    assert [one.number for one in first] == [1, 1, 1]
    second = await lease(connection, 3)
    assert len(second) == 2
    assert not {one.id for one in first} & {one.id for one in second}
    for one in await listed(connection):
        assert [attempt.outcome for attempt in one.attempts] == [Attempt.UNKNOWN]
        assert one.state == notifications_pb2.Delivery.PENDING


async def test_the_outcome_of_a_lost_lease_is_not_recorded(
    connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 1)
    (slow,) = await lease(connection, seconds=0.0)
    (quick,) = await lease(connection)
    assert (slow.id, slow.number, quick.number) == (quick.id, 1, 2)
    assert slow.idempotency_key == quick.idempotency_key
    assert await outcomes.record(connection, [delivered(slow)]) == set()
    assert (await listed(connection))[0].state == notifications_pb2.Delivery.PENDING
    assert await outcomes.record(connection, [delivered(quick)]) == {quick.id}
    assert await outcomes.record(connection, [delivered(quick)]) == set()
    (one,) = await listed(connection)
    assert [attempt.outcome for attempt in one.attempts] == [Attempt.UNKNOWN, Attempt.SUCCEEDED]


async def test_what_a_killed_process_had_in_flight_is_sent_again(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 6)
    killed = await lease(connection, 4, seconds=0.2)
    channel = Scripted(OK)
    async with running(pool, channel, lease=0.2):
        await eventually(lambda: _in_state(connection, State.DELIVERED))
    keys = {one.idempotency_key for one in killed}
    for one in await listed(connection):
        outcomes = [attempt.outcome for attempt in one.attempts]
        assert outcomes == ([Attempt.UNKNOWN] if one.idempotency_key in keys else []) + [Attempt.SUCCEEDED]


async def test_what_kills_its_process_each_time_is_parked(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 1)
    for _ in range(3):
        assert await lease(connection, seconds=0.0, tries=3)
    assert await lease(connection, tries=3) == []
    assert len(await outcomes.park_exhausted(connection, EMAIL, 3, TRIES_EXHAUSTED)) == 1
    (one,) = await listed(connection)
    assert one.state == notifications_pb2.Delivery.PARKED
    assert [attempt.outcome for attempt in one.attempts] == [Attempt.UNKNOWN] * 3


async def test_new_work_is_taken_at_once_and_slots_bound_it(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    channel = Scripted(OK, delay=0.05)
    async with running(pool, channel, slots=4, poll_interval=60.0) as dispatcher:
        await asyncio.sleep(0.1)
        await fill(connection, composer, events, 12)
        dispatcher.wake()
        await eventually(lambda: len(channel.sent) == 12, 2.0)
        assert channel.most == 4


async def test_drain_records_what_is_on_its_way_and_takes_no_more(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 20)
    channel = Scripted(OK, delay=0.2)
    async with running(pool, channel, slots=4) as dispatcher:
        await eventually(lambda: dispatcher.busy == 4)
        await dispatcher.drain(2.0)
        assert dispatcher.busy == 0
        assert channel.closed
    outcomes = [[attempt.outcome for attempt in one.attempts] for one in await listed(connection)]
    assert outcomes.count([Attempt.SUCCEEDED]) == 4
    assert outcomes.count([]) == 16


async def test_drain_gives_up_what_takes_too_long(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 2)
    async with running(pool, Scripted(OK, delay=1.5), slots=4) as dispatcher:
        await eventually(lambda: dispatcher.busy == 2)
        await dispatcher.drain(0.05)
    for one in await listed(connection):
        assert [attempt.outcome for attempt in one.attempts] == [Attempt.UNKNOWN]


async def test_a_database_that_goes_away_costs_no_outcome(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await fill(connection, composer, events, 30)
    channel = Scripted(OK, delay=0.02)
    # Where the answer to `begin` is cut off, attempts have begun that are not made: others are, when the lease is over.
    policy = replace(FAST, tries=20, timeout=1.0)
    async with running(pool, channel, slots=4, policy=policy, lease=2.0):
        for _ in range(5):
            await asyncio.sleep(0.03)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()"
            )
        await eventually(lambda: _in_state(connection, State.DELIVERED), 60.0)
    outcomes = [attempt.outcome for one in await listed(connection) for attempt in one.attempts]
    # What was sent is known to have been, and so nothing was sent twice.
    assert len({message.idempotency_key for message in channel.sent}) == 30
    assert outcomes.count(Attempt.SUCCEEDED) == len(channel.sent) == 30
    assert set(outcomes) <= {Attempt.SUCCEEDED, Attempt.UNKNOWN}


def _decide(outcome: Outcome, number: int = 1) -> Ended:
    leased = Leased(uuid.uuid4(), number, EMAIL, "a@b", "k", b"", None, "", "", uuid.uuid4())
    return decide(Policy(tries=8, base=2.0, factor=4.0, cap=3600.0), leased, outcome)


def _delays(outcome: Outcome, number: int) -> Sequence[float]:
    return [_decide(outcome, number).delay for _ in range(300)]


def test_pauses_grow_with_full_jitter_up_to_the_cap() -> None:
    for number, bound in ((1, 2.0), (2, 8.0), (4, 128.0), (7, 3600.0)):
        delays = _delays(LATER, number)
        assert 0 <= min(delays) < bound * 0.1
        assert bound * 0.9 < max(delays) <= bound
    assert _decide(LATER, 8).state is State.PARKED
    assert Policy(1000, 2.0, 4.0, 3600.0).bound(1000) == 3600.0


def test_retry_after_is_a_lower_bound_up_to_a_day() -> None:
    assert min(_delays(replace(LATER, retry_after=60.0), 1)) == 60.0
    assert max(_delays(replace(LATER, retry_after=1e9), 1)) == 86_400.0
