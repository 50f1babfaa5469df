"""The delivery engine: nobody overtakes, an outage pauses and does not park, providers stand in for each other."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notification_service import lanes, policies, providers, rules
from notification_service.breaker import Breaker, Patience
from notification_service.channels import Channel, Message, Outcome
from notification_service.compose import Composer
from notification_service.destinations import Destination, target_of
from notification_service.dispatcher import Dispatcher, Lane
from notification_service.domain import EMAIL, TARGET_GONE, WEBHOOK, Operation, Result, State
from notification_service.endpoints import Endpoint
from notification_service.inbox import Inbox
from notification_service.limits import Bucket
from notification_service.retries import Policy
from notification_service.routes import Providers, Route, Routes, Target, Targets
from notification_service.store import feed, leases, outcomes, parked, pending, reads, standing
from notification_service.templates import Templates
from servicekit.configfile import InvalidConfigError
from servicekit.database import Connection, Pool
from tests.notifications.conftest import SENDER, Events, batch, dispatching, eventually, write
from tidings.notifications.v1 import notifications_pb2
from tidings.users.v1 import users_pb2

TOKYO = ZoneInfo("Asia/Tokyo")
FAST = Policy(tries=3, base=0.01, factor=2.0, cap=0.05, timeout=2.0)
PATIENCE = Patience(failures=3, pause=0.05, longest=0.2)
OK = Outcome(Result.SUCCEEDED, 250, "OK")
NO = Outcome(Result.REFUSED, 550, "no such user")
LATER = Outcome(Result.FAILED, 451, "later")
DOWN = Outcome(Result.FAILED, 0, "connection refused", outage=True)

Delivery = notifications_pb2.Delivery


class Other:
    """The other side: answers by target, or with what it is told to for all, and remembers in which order."""

    def __init__(self, answer: Outcome = OK) -> None:
        self.answer = answer
        self.planned: dict[str, list[Outcome]] = {}
        self.sent: list[Message] = []
        self.delay = 0.0
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}

    async def send(self, message: Message) -> Outcome:
        self.sent.append(message)
        self.now[message.target] = now = self.now.get(message.target, 0) + 1
        self.most[message.target] = max(now, self.most.get(message.target, 0))
        await asyncio.sleep(self.delay)
        self.now[message.target] -= 1
        planned = self.planned.get(message.target)
        return planned.pop(0) if planned else self.answer

    async def close(self) -> None:
        pass


def smtp(*others: Channel, patience: Patience = PATIENCE) -> Providers:
    return Providers([Route(f"smtp{number}", one, Breaker(patience), 64) for number, one in enumerate(others)])


def running(
    pool: Pool, routes: Routes, channel: str = EMAIL, policy: Policy = FAST
) -> AbstractAsyncContextManager[Dispatcher]:
    return dispatching(pool, {channel: Lane(routes, policy, 8)})


async def store(connection: Connection, composer: Composer, *made: users_pb2.UserEvent) -> None:
    await Inbox(composer, lambda: None).store(connection, await feed.read_cursor(connection), batch(*made))


async def listed(connection: Connection) -> list[Delivery]:
    """All deliveries, oldest first."""
    return [one.delivery for one in await reads.list_deliveries(connection, {}, 1 << 62, 10_000)][::-1]


async def states(connection: Connection) -> list[str]:
    return [State(one.state).name for one in await listed(connection)]


def renames(events: Events, name: str, count: int) -> list[users_pb2.UserEvent]:
    """A user that is created and renamed again and again: with `telling` one mail each, all to one address."""
    created = events.created(name)
    return [created, *(events.updated(created.user, display_name=str(number)) for number in range(count - 1))]


@pytest.fixture
def telling(tmp_path: Path) -> Composer:
    """Says something by mail at each change."""
    text = (
        '[[rules]]\nname = "told"\non = ["CREATED", "UPDATED"]\ntemplate = "welcome"\ncategory = "account"\n'
        'channels = ["email"]\n'
    )
    return Composer(rules.load(write(tmp_path / "rules.toml", text)), Templates(), lanes.writers(SENDER, ()))


async def test_what_is_pending_for_a_deleted_user_is_cancelled(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    ada, bob, eve = events.created("ada"), events.created("bob"), events.created("eve")
    await store(connection, composer, ada, bob)
    picked, _ = await leases.pick(connection, EMAIL, 1, None, seconds=30.0, max_tries=3, busy=[])
    (leased,) = await leases.begin(connection, [(one, "smtp0") for one in picked], max_age=60.0)
    await store(connection, composer, eve, events.deleted(ada.user), events.deleted(bob.user), events.deleted(eve.user))
    # What is on its way goes on; what the deletion itself says goes out.
    assert leased.target == "ada@example.com"
    assert await states(connection) == ["PENDING", "CANCELLED", "CANCELLED", "PENDING", "PENDING", "PENDING"]
    assert [one.end_reason for one in (await listed(connection))[1:3]] == ["USER_DELETED"] * 2
    await connection.execute("UPDATE deliveries SET lease_until = now()")
    other = Other()
    async with running(pool, smtp(other)):
        await eventually(lambda: _all(connection, "DELIVERED", "CANCELLED"))
    assert len(other.sent) == 4


async def test_nobody_overtakes_on_the_way_to_one_address(
    pool: Pool, connection: Connection, telling: Composer, events: Events
) -> None:
    await store(connection, telling, *renames(events, "ada", 12), *renames(events, "bob", 12))
    other = Other()
    other.delay = 0.003
    other.planned["ada@example.com"] = [LATER, OK, LATER, LATER]
    async with running(pool, smtp(other)), running(pool, smtp(other)):
        await eventually(lambda: _all(connection, "DELIVERED"))
    for address in ("ada@example.com", "bob@example.com"):
        assert other.most[address] == 1
        keys = [message.idempotency_key for message in other.sent if message.target == address]
        wanted = [one.idempotency_key for one in await listed(connection) if one.target == address]
        assert list(dict.fromkeys(keys)) == wanted
    # A retry is not overtaken either.
    assert len(other.sent) == 24 + 3


async def _all(connection: Connection, *wanted: str) -> bool:
    return set(await states(connection)) <= set(wanted)


async def test_a_parked_one_holds_back_the_later_ones_until_it_is_dealt_with(
    pool: Pool, connection: Connection, telling: Composer, events: Events
) -> None:
    await store(connection, telling, *renames(events, "ada", 3), events.created("bob"))
    other = Other()
    other.planned["ada@example.com"] = [NO]
    async with running(pool, smtp(other)) as dispatcher:
        await eventually(lambda: _are(connection, "PARKED", "PENDING", "PENDING", "DELIVERED"))
        first, second, third, _ = await listed(connection)
        await eventually(lambda: _waits_for(connection, 2, second.id))
        assert (first.end_reason, (await listed(connection))[1].waits_for) == ("REFUSED", first.id)
        assert third.channel == EMAIL
        await asyncio.sleep(0.15)
        assert len(other.sent) == 2
        ids = [uuid.UUID(first.id)]
        await parked.change(connection, Operation.DISCARDED, ids, actor="", reason="")
        dispatcher.wake()
        await eventually(lambda: _are(connection, "DISCARDED", "DELIVERED", "DELIVERED", "DELIVERED"))


async def _are(connection: Connection, *wanted: str) -> bool:
    return await states(connection) == list(wanted)


async def _waits_for(connection: Connection, number: int, identity: str) -> bool:
    return (await listed(connection))[number].waits_for == identity


async def test_a_policy_may_let_them_pass(
    pool: Pool, connection: Connection, telling: Composer, events: Events
) -> None:
    await store(connection, telling, *renames(events, "ada", 3))
    other = Other()
    other.planned["ada@example.com"] = [NO]
    async with running(pool, smtp(other), policy=replace(FAST, parked_holds=False)):
        await eventually(lambda: _are(connection, "PARKED", "DELIVERED", "DELIVERED"))


async def test_what_was_put_behind_at_the_wrong_moment_is_let_go(
    connection: Connection, telling: Composer, events: Events
) -> None:
    await store(connection, telling, *renames(events, "ada", 2))
    first, second = await listed(connection)
    picked, behind = await leases.pick(connection, EMAIL, 8, None, seconds=30.0, max_tries=3, busy=[])
    assert ([str(one.id) for one in picked], behind) == ([first.id], 1)
    assert await outcomes.let_go(connection, EMAIL) == 0
    await connection.execute("UPDATE deliveries SET state = 2 WHERE id = %s", (first.id,))
    assert await outcomes.let_go(connection, EMAIL) == 1
    picked, _ = await leases.pick(connection, EMAIL, 8, None, seconds=30.0, max_tries=3, busy=[])
    assert [str(one.id) for one in picked] == [second.id]


async def test_an_outage_pauses_and_parks_nothing(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await store(connection, composer, *(events.created(f"user{number}") for number in range(30)))
    other = Other(DOWN)
    async with running(pool, smtp(other)):
        await eventually(lambda: len(other.sent) >= 12)
        # Each slot once before the outage is noticed, one probe a pause after that: not 30 deliveries by 3 tries.
        assert await _all(connection, "PENDING")
        sent = len(other.sent)
        await asyncio.sleep(0.3)
        assert len(other.sent) - sent <= 0.3 / PATIENCE.pause + 1
        other.answer = OK
        await eventually(lambda: _all(connection, "DELIVERED"))


async def test_what_fails_by_itself_is_parked_also_beside_an_outage(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await store(connection, composer, events.created("ada"))
    async with running(pool, smtp(Other(LATER))):
        await eventually(lambda: _all(connection, "PARKED"))
    (one,) = await listed(connection)
    assert (one.end_reason, len(one.attempts)) == ("TRIES_EXHAUSTED", 3)


async def test_an_outage_does_not_last_for_ever(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    await store(connection, composer, events.created("ada"))
    async with running(pool, smtp(Other(DOWN)), policy=replace(FAST, tries=100, max_age=0.2)):
        await eventually(lambda: _all(connection, "PARKED"))
    (one,) = await listed(connection)
    assert one.end_reason == "EXPIRED"


async def test_another_provider_stands_in(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    first, second = Other(DOWN), Other()
    async with running(pool, smtp(first, second)):
        await store(connection, composer, *(events.created(f"user{number}") for number in range(20)))
        await eventually(lambda: _all(connection, "DELIVERED"))
        tried = [[attempt.provider for attempt in one.attempts] for one in await listed(connection)]
        assert {tuple(one) for one in tried} <= {("smtp0", "smtp1"), ("smtp1",)}
        assert ["smtp0", "smtp1"] in tried
        # It is asked again when it is back.
        first.answer = OK
        made = [events.created(f"later{number}") for number in range(30)]
        for number in range(0, 30, 3):
            await store(connection, composer, *made[number : number + 3])
            await asyncio.sleep(0.05)
        await eventually(lambda: _all(connection, "DELIVERED"))
    assert [attempt.provider for attempt in (await listed(connection))[-1].attempts] == ["smtp0"]


def _destinations(*names: str) -> list[Destination]:
    return [Endpoint(name=name, url=_url(name), secret="whsec_" + "A" * 32).destination() for name in names]


def _composer(endpoints: Iterable[Destination]) -> Composer:
    return Composer(rules.load(None), Templates(), lanes.writers(SENDER, endpoints))


def _url(name: str) -> str:
    return f"https://{name}.example.com/"


async def test_an_endpoint_that_is_away_or_slow_hides_nothing_of_the_others(
    pool: Pool, connection: Connection, events: Events
) -> None:
    endpoints = _destinations("away", "slow", "well")
    composer = _composer(endpoints)
    users = [events.created(f"user{number}") for number in range(20)]
    await store(connection, composer, *users)
    other = Other()

    class Calls(Other):
        async def send(self, message: Message) -> Outcome:
            if "slow" in message.target:
                await asyncio.sleep(60.0)
            other.sent.append(message)
            return DOWN if "away" in message.target else OK

    named = {one.url: Target(one.name) for one in endpoints}
    routes = Targets(Calls(), lambda: named, tuple, 8, PATIENCE)
    async with running(pool, routes, WEBHOOK, replace(FAST, timeout=60.0)) as dispatcher:
        await eventually(lambda: sum("well" in one.target for one in other.sent) == 20)
        by_target = {route.name: route for route in routes.standing()}
        assert by_target["away"].breaker.is_open
        assert by_target["slow"].busy == by_target["slow"].most == 3
        await dispatcher.drain(0.05)
    parked_ones = [one for one in await listed(connection) if one.state == Delivery.PARKED]
    assert parked_ones == []


async def test_a_target_that_is_not_named_is_not_asked(pool: Pool, connection: Connection, events: Events) -> None:
    composer = _composer(_destinations("one", "other"))
    await store(connection, composer, events.created("ada"))
    calls = Other()
    named = {_url("one"): Target("one")}
    async with running(pool, Targets(calls, lambda: named, tuple, 8, PATIENCE), WEBHOOK):
        await eventually(lambda: len(calls.sent) == 1)
        await asyncio.sleep(0.15)
        assert len(calls.sent) == 1
        named[_url("other")] = Target("other")
        await eventually(lambda: len(calls.sent) == 2)


async def test_what_has_no_target_any_more_is_cancelled_after_a_while(connection: Connection, events: Events) -> None:
    composer = _composer(_destinations("kept", "gone"))
    await store(connection, composer, events.created("ada"), events.created("bob"))
    known = [_url("kept")]

    async def cancel(patience: float) -> int:
        return len(await pending.cancel_gone(connection, WEBHOOK, known, patience=patience, reason=TARGET_GONE))

    assert await cancel(600.0) == 0
    await connection.execute("UPDATE deliveries SET next_attempt_time = now() - interval '1 hour'")
    assert await cancel(600.0) == 2
    ended = {(one.target, State(one.state).name, one.end_reason) for one in await listed(connection)}
    assert ("https://gone.example.com/", "CANCELLED", "TARGET_GONE") in ended
    assert ("https://kept.example.com/", "PENDING", "") in ended
    assert (await standing.inbox_state(connection)).cancelled == 2


async def test_what_its_user_does_not_want_is_cancelled_and_what_must_wait_stands_aside(
    pool: Pool, connection: Connection, composer: Composer, events: Events
) -> None:
    ada, bob, cyd = events.created("ada"), events.created("Bob"), events.created("cyd", time_zone="Asia/Tokyo")
    for event, document in (
        (ada, {"channels": {"email": False}}),
        (cyd, {"quiet_hours": {"start": "00:00", "end": "00:00", "weekdays": [datetime.now(TOKYO).isoweekday()]}}),
    ):
        await connection.execute(
            "INSERT INTO preferences (user_id, document, version, update_time) VALUES (%s, %s, 1, now())",
            (event.user.id, json.dumps(document)),
        )
    await connection.execute(
        "INSERT INTO suppressions (channel, target, reason, create_time)"
        " VALUES ('email', 'bob@example.com', 'BOUNCED', now())"
    )
    moved = events.updated(cyd.user, email="cyd@example.org")
    await store(connection, composer, ada, bob, cyd, moved)
    other = Other()
    async with running(pool, smtp(other)):
        await eventually(lambda: _are(connection, "CANCELLED", "CANCELLED", "PENDING", "DELIVERED", "DELIVERED"))
    switched, suppressed, quiet, *security = await listed(connection)
    assert (switched.end_reason, [one.reason for one in switched.decisions]) == ("SWITCHED_OFF", ["SWITCHED_OFF"])
    assert "BOUNCED" in suppressed.decisions[0].detail
    assert suppressed.end_reason == "SUPPRESSED"
    # The security notices go past what stands aside, in the middle of the night, too.
    assert (
        {one.target for one in security} == {"cyd@example.com", "cyd@example.org"} == {one.target for one in other.sent}
    )
    (decision,) = quiet.decisions
    assert (decision.reason, "Asia/Tokyo" in decision.detail, len(quiet.attempts)) == ("QUIET_HOURS", True, 0)
    assert quiet.next_attempt_time.ToDatetime(UTC) > datetime.now(UTC)


# The parts that know only the time


def test_a_breaker_opens_probes_and_closes() -> None:
    breaker = Breaker(Patience(failures=3, pause=10.0, longest=35.0))
    assert [breaker.failed(1.0), breaker.failed(2.0), breaker.room(2.0)] == [False, False, None]
    assert breaker.failed(3.0)
    assert (breaker.room(3.0), breaker.wait(3.0), breaker.room(13.0)) == (0, 10.0, 1)
    # What was on its way says nothing new.
    assert not breaker.failed(4.0)
    assert breaker.room(13.0) == 1
    breaker.begun(13.0, 5.0)
    assert breaker.room(14.0) == 0
    assert breaker.failed(14.0)
    assert (breaker.wait(14.0), breaker.room(34.0)) == (20.0, 1)
    breaker.begun(34.0, 5.0)
    assert breaker.failed(35.0)
    assert breaker.wait(35.0) == 35.0
    # A probe whose answer never came is followed by another.
    breaker.begun(70.0, 5.0)
    assert breaker.room(75.0) == 1
    breaker.begun(75.0, 5.0)
    assert breaker.answered()
    assert (breaker.is_open, breaker.room(75.0)) == (False, None)
    assert not breaker.answered()
    assert not breaker.failed(76.0)


def test_who_says_when_to_come_back_is_left_alone_till_then() -> None:
    breaker = Breaker(Patience(failures=3, pause=10.0, longest=35.0))
    assert breaker.failed(0.0, 120.0)
    assert (breaker.wait(0.0), breaker.room(119.0), breaker.room(120.0)) == (120.0, 0, 1)


@given(
    st.floats(0.1, 1000.0),
    st.one_of(st.none(), st.floats(1.0, 50.0)),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 100)), max_size=60),
)
def test_a_bucket_gives_no_more_than_its_rate_and_a_burst(
    rate: float, burst: float | None, asked: Sequence[tuple[float, int]]
) -> None:
    bucket, now, taken = Bucket(rate, burst), 0.0, 0
    for pause, count in asked:
        now += pause
        room = bucket.room(now)
        assert room >= 0
        bucket.take(min(room, count))
        taken += min(room, count)
        assert taken <= max(1.0, rate if burst is None else burst) + rate * now + 1e-6
        if not bucket.room(now):
            assert bucket.room(now + bucket.wait() + 1e-6) >= 1
            now += bucket.wait() + 1e-6


def test_policies_come_from_the_file_over_the_settings(tmp_path: Path) -> None:
    path = write(
        tmp_path / "policies.toml",
        '[[policies]]\nname = "webhook"\ntries = 12\nretry_base = 5.0\nretry_codes = [404]\nparked_holds = false\n',
    )
    found = policies.load(path, FAST, 30.0)
    assert found[EMAIL] == FAST
    assert found[WEBHOOK] == replace(FAST, tries=12, base=5.0, retry_codes=frozenset({404}), parked_holds=False)
    assert found[WEBHOOK].judge(Outcome(Result.REFUSED, 404)) is Result.FAILED
    assert found[EMAIL].judge(Outcome(Result.REFUSED, 404)) is Result.REFUSED
    for text, said in (
        ('[[policies]]\nname = "fax"\n', "name"),
        ('[[policies]]\nname = "email"\ntries = 0\n', "tries"),
        ('[[policies]]\nname = "email"\ntimeout = 20.0\n', "half of TIDINGS_NOTIFICATIONS_LEASE"),
    ):
        with pytest.raises(InvalidConfigError, match=said):
            policies.load(write(tmp_path / "bad.toml", text), FAST, 30.0)


def test_providers_come_in_the_file_s_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = providers.Provider(name="smtp", host="127.0.0.1", port=25)
    assert providers.load(None, default) == (default,)
    monkeypatch.setenv("RELAY_PASSWORD", "secret")
    path = write(
        tmp_path / "providers.toml",
        '[[providers]]\nname = "relay"\nhost = "a"\nport = 587\nusername = "u"\npassword_env = "RELAY_PASSWORD"\n'
        '[[providers]]\nname = "spare"\nhost = "b"\nport = 25\nrate = 5.0\n',
    )
    relay, spare = providers.load(path, default)
    assert (relay.name, relay.secret, spare.rate) == ("relay", "secret", 5.0)
    for text, said in (
        ('[[providers]]\nname = "a"\nhost = "b"\nport = 25\npassword_env = "NOWHERE"\n', "NOWHERE is not set"),
        ('[[providers]]\nname = "a"\nhost = "b"\nport = 25\npassword = "x"\n', "username"),
        ("", "has no provider"),
    ):
        with pytest.raises(InvalidConfigError, match=said):
            providers.load(write(tmp_path / "bad.toml", text), default)


async def test_what_waits_for_no_failure_is_not_old(pool: Pool, connection: Connection, events: Events) -> None:
    composer = Composer(rules.load(None), Templates(), lanes.writers(SENDER, ()))
    await store(connection, composer, *(events.created(f"user{number}") for number in range(3)))
    await connection.execute("UPDATE deliveries SET create_time = now() - position * interval '1 hour'")

    async def age() -> float:
        [(channel, pending, _, oldest)] = await standing.of_channels(connection)
        assert (channel, pending) == (EMAIL, 3)
        return round((oldest or 0) / 3600)

    assert await age() == 3
    await connection.execute("UPDATE deliveries SET deferred = 3 WHERE position = 3")
    assert await age() == 2
    await connection.execute("UPDATE deliveries SET behind = gen_random_uuid() WHERE position = 2")
    assert await age() == 1
    made = await connection.execute(
        "INSERT INTO endpoints (id, name, url, state, create_time, update_time)"
        " VALUES (gen_random_uuid(), 'a', 'http://a', 2, now(), now()) RETURNING id"
    )
    [(endpoint,)] = await made.fetchall()
    await connection.execute("UPDATE deliveries SET target = %s WHERE position = 1", [target_of(endpoint)])
    assert await age() == 0
    await connection.execute("UPDATE endpoints SET state = 1")
    assert await age() == 1
