"""Windows of digests, without a database: when they close, whatever the clocks do, and what goes into which."""

from __future__ import annotations

import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notification_service import domain, views
from notification_service.domain import USER_DELETED, DigestState, Item, Notification
from notification_service.rules import Digest
from notification_service.windows import Placed, Window, closes, gather, next_local
from tests.notifications.test_quiet_hours import places, times

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
_MINUTE = timedelta(minutes=1)


def by_clock(at: time, zone: ZoneInfo, after: datetime) -> datetime:
    """The same by looking at the clock every minute."""
    moment = after.replace(second=0, microsecond=0)
    before = moment.astimezone(zone).replace(tzinfo=None)
    while True:
        moment += _MINUTE
        shown = moment.astimezone(zone)
        now = shown.replace(tzinfo=None)
        # A day that the clocks leave out is jumped over, too.
        skipped = (datetime.combine(before.date() + timedelta(days=n), at) for n in range(3))
        if any(before < wall < now for wall in skipped) or (now.time() == at and not shown.fold):
            return moment
        before = now


@settings(max_examples=40)
@given(times, places())
def test_a_window_closes_the_next_time_that_the_clocks_show_it(at: time, place: tuple[ZoneInfo, datetime]) -> None:
    zone, instant = place
    if instant.year < 1975:  # offsets had seconds
        instant = instant.replace(year=1975, day=1)
    assert next_local(at, zone, instant) == by_clock(at, zone, instant)


@pytest.mark.parametrize(
    ("at", "opened", "closed"),
    [
        pytest.param("08:00", "2026-11-25T07:59+01:00", "2026-11-25T08:00+01:00", id="today"),
        pytest.param("08:00", "2026-11-25T08:00+01:00", "2026-11-26T08:00+01:00", id="at that time: tomorrow"),
        pytest.param("08:00", "2026-03-28T12:00+01:00", "2026-03-29T08:00+02:00", id="a night of 23 hours"),
        pytest.param("08:00", "2026-10-24T12:00+02:00", "2026-10-25T08:00+01:00", id="a night of 25 hours"),
        pytest.param("02:30", "2026-03-29T01:00+01:00", "2026-03-29T03:00+02:00", id="jumped over: the jump"),
        pytest.param("02:30", "2026-10-25T01:00+02:00", "2026-10-25T02:30+02:00", id="shown twice: the first"),
        pytest.param("02:30", "2026-10-25T02:45+02:00", "2026-10-26T02:30+01:00", id="not a second time"),
    ],
)
def test_in_berlin(at: str, opened: str, closed: str) -> None:
    daily = Digest.model_validate({"name": "daily", "at": at, "category": "c"})
    assert closes(daily, "Europe/Berlin", datetime.fromisoformat(opened)) == datetime.fromisoformat(closed)


def test_a_window_without_a_local_time_lasts_as_long_as_it_says_and_nobody_s_zone_is_utc() -> None:
    hourly = Digest.model_validate({"name": "hourly", "window": "1h", "category": "c"})
    assert closes(hourly, "Europe/Berlin", NOW) == NOW + timedelta(hours=1)
    daily = Digest.model_validate({"name": "daily", "at": "08:00", "category": "c"})
    assert closes(daily, "", NOW) == closes(daily, "Nowhere/AtAll", NOW) == datetime(2026, 11, 26, 8, tzinfo=UTC)


USERS = (uuid.UUID(int=1), uuid.UUID(int=2))
ADDRESSES = ("a@example.com", "b@example.com")
NAMES = ("hourly", "daily")


@dataclass(frozen=True, slots=True)
class Event:
    """Of a user: mails to some addresses for a digest; or the end of the user."""

    user: uuid.UUID
    digest: str
    addresses: tuple[str, ...]
    is_end: bool


one_event = st.builds(
    Event,
    st.sampled_from(USERS),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=2).map(tuple),
    st.sampled_from([False] * 5 + [True]),
)
batches = st.lists(st.lists(one_event, min_size=1, max_size=6), min_size=1, max_size=6)


def made_of(position: int, event: Event) -> Notification:
    event_id = uuid.uuid5(uuid.NAMESPACE_OID, str(position))
    return Notification(
        id=domain.notification_id(event_id, "r"),
        user_id=event.user,
        event_id=event_id,
        event_position=position,
        rule="r",
        category="c",
        template="t",
        channels=("email",),
        subject="",
        body="",
        trace_parent="",
        trace_state="",
        items=tuple(Item(event.digest, address, "", json.dumps(position)) for address in event.addresses),
    )


@dataclass(slots=True)
class Kept:
    """What a database would keep of it."""

    windows: dict[uuid.UUID, Window]
    placed: list[Placed]
    notifications: list[Notification]

    def store(self, numbered: Sequence[tuple[int, Event]], most: int) -> None:
        """A batch of events."""
        digests = {
            name: Digest.model_validate({"name": name, "window": "1h", "category": "c", "most": most}) for name in NAMES
        }
        deleted = {event.user: position for position, event in numbered if event.is_end}
        opened = [one for one in self.windows.values() if one.state is DigestState.OPEN]
        made = [made_of(position, event) for position, event in numbered]
        found = gather(made, deleted, opened, digests, NOW)
        assert {one.id for one in found.changed} <= {one.id for one in opened}
        assert not {one.id for one in found.opened} & self.windows.keys()
        self.windows |= {one.id: one for one in (*found.changed, *found.opened)}
        self.placed += found.placed
        self.notifications += found.notifications

    def open_items(self) -> list[Placed]:
        """What will be said."""
        return [one for one in self.placed if self.windows[one.digest_id].state is DigestState.OPEN]


def play(parts: Sequence[Sequence[tuple[int, Event]]], most: int) -> Kept:
    kept = Kept({}, [], [])
    for part in parts:
        kept.store(part, most)
    return kept


@given(batches, st.integers(1, 4))
def test_every_mail_goes_into_one_window_of_its_own_kind(events: list[list[Event]], most: int) -> None:
    flat = list(enumerate((one for part in events for one in part), 1))
    numbered = iter(flat)
    kept = play([[next(numbered) for _ in part] for part in events], most)

    where = {(one.notification_id, kept.windows[one.digest_id].target): one for one in kept.placed}
    assert len(where) == len(kept.placed)
    wanted = {(made_of(position, event).id, address) for position, event in flat for address in event.addresses}
    assert where.keys() == wanted

    ends: dict[uuid.UUID, list[int]] = defaultdict(list)
    for position, event in flat:
        if event.is_end:
            ends[event.user].append(position)
    for window in kept.windows.values():
        inside = [one for one in kept.placed if one.digest_id == window.id]
        assert [one.number for one in inside] == list(range(1, window.items + 1))
        positions = [json.loads(one.view) for one in inside]
        assert positions == sorted(positions)
        assert 1 <= window.items <= most
        assert window.gathers == (window.items < most and window.state is DigestState.OPEN and not window.end_reason)
        # A deletion parts what was before it from what comes after it.
        last = max(ends[window.user_id], default=0)
        assert (window.state, window.end_reason) == (
            (DigestState.CANCELLED, USER_DELETED) if positions[0] < last else (DigestState.OPEN, "")
        )
        assert window.state is DigestState.OPEN or positions[-1] < last
    gathering = Counter(one.key for one in kept.windows.values() if one.gathers)
    assert not gathering or max(gathering.values()) == 1
    for one in kept.notifications:
        assert (one.digest_id is None) == (not one.items)
        assert one.digest_id is None or kept.windows[one.digest_id].target == one.items[0].target


@given(batches, st.integers(1, 4))
def test_how_events_are_cut_into_batches_makes_no_difference(events: list[list[Event]], most: int) -> None:
    flat = list(enumerate((one for part in events for one in part), 1))
    numbered = iter(flat)
    cut, whole = play([[next(numbered) for _ in part] for part in events], most), play([flat], most)
    assert cut.open_items() == whole.open_items()


def test_a_window_is_as_its_last_item_has_it() -> None:
    digest = Digest.model_validate({"name": "hourly", "window": "1h", "category": "c"})
    first = replace(
        made_of(1, Event(USERS[0], "hourly", ADDRESSES[:1], False)), items=(Item("hourly", ADDRESSES[0], "en", "{}"),)
    )
    [opened] = gather([first], {}, [], {"hourly": digest}, NOW).opened
    second = replace(
        made_of(2, Event(USERS[0], "hourly", ADDRESSES[:1], False)),
        time_zone="Asia/Tokyo",
        items=(Item("hourly", ADDRESSES[0], "de", "{}"),),
    )
    later = Digest.model_validate({"name": "hourly", "window": "2h", "category": "c", "template": "other"})
    found = gather([second], {}, [opened], {"hourly": later}, NOW + _MINUTE)
    [changed] = found.changed
    assert (changed.locale, changed.time_zone, changed.template) == ("de", "Asia/Tokyo", "other")
    # When it closes was said when it opened.
    assert changed.close_time == NOW + timedelta(hours=1)
    assert (changed.event_id, changed.open_time, changed.items) == (first.event_id, NOW, 2)


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.datetimes(timezones=st.just(UTC))
keys = st.text(min_size=1)


some = scalars | st.lists(scalars, max_size=3) | st.dictionaries(keys, scalars, max_size=3)


@settings(max_examples=50)
@given(st.dictionaries(keys, some, max_size=4))
def test_a_view_survives_its_encoding(view: dict[str, object]) -> None:
    assert views.decode(views.encode(view)) == view


def test_a_view_has_no_other_things() -> None:
    with pytest.raises(TypeError, match="a view has no date"):
        views.encode({"day": date(2026, 11, 25)})
