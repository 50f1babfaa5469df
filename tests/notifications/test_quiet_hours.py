"""Quiet hours: nothing is sent within them, nothing waits longer than they last, whatever the clocks do."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notification_service.quiet_hours import EVERY_DAY, QuietHours, quiet_until

NIGHT = QuietHours(time(22), time(7))
BERLIN = ZoneInfo("Europe/Berlin")

times = st.builds(time, st.integers(0, 23), st.integers(0, 59))
days = st.frozensets(st.integers(1, 7), min_size=1)
hours_of_any_kind = st.tuples(times, times, days).filter(lambda it: it[0] != it[1] or it[2] != EVERY_DAY)
any_hours = hours_of_any_kind.map(lambda it: QuietHours(*it))
zones = st.sampled_from(sorted(available_timezones() - {"localtime", "Factory"})).map(ZoneInfo)
# 1970 to 2036
plain_instants = st.integers(864_000, 2_114_380_800).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@st.composite
def places(draw: st.DrawFn) -> tuple[ZoneInfo, datetime]:
    """A zone and an instant, half of them within two days of a change of the zone's clocks."""
    zone, instant = draw(zones), draw(plain_instants)
    changes = [day for n in range(366) if offset(zone, day := instant + timedelta(days=n)) != offset(zone, day + _DAY)]
    if changes and draw(st.booleans()):
        instant = draw(st.sampled_from(changes)) + timedelta(minutes=draw(st.integers(-2880, 2880)))
    return zone, instant


_DAY = timedelta(days=1)


def offset(zone: ZoneInfo, instant: datetime) -> timedelta | None:
    return instant.astimezone(zone).utcoffset()


def shown(hours: QuietHours, zone: ZoneInfo, instant: datetime) -> bool:
    """Whether the clocks show a time within the hours: all of the truth while they do not change."""
    local = instant.astimezone(zone)
    today, yesterday = local.isoweekday(), (local.date() - _DAY).isoweekday()
    if hours.start < hours.end:
        return today in hours.weekdays and hours.start <= local.time() < hours.end
    return (today in hours.weekdays and local.time() >= hours.start) or (
        yesterday in hours.weekdays and local.time() < hours.end
    )


def steady(zone: ZoneInfo, instant: datetime) -> bool:
    """Whether the clocks do not change around an instant."""
    return len({offset(zone, instant + timedelta(hours=n)) for n in range(-49, 50)}) == 1


@given(any_hours, places())
def test_nothing_is_sent_while_the_clocks_show_quiet_hours(hours: QuietHours, place: tuple[ZoneInfo, datetime]) -> None:
    zone, instant = place
    until = quiet_until(hours, zone, instant)
    if shown(hours, zone, instant):
        assert until is not None
    if steady(zone, instant):
        assert (until is not None) == shown(hours, zone, instant)


@given(any_hours, places())
def test_what_waits_is_sent_at_the_first_instant_outside(hours: QuietHours, place: tuple[ZoneInfo, datetime]) -> None:
    zone, instant = place
    until = quiet_until(hours, zone, instant)
    if until is None:
        return
    assert instant < until <= instant + timedelta(days=15)
    assert quiet_until(hours, zone, until) is None
    for part in range(1, 20):
        assert quiet_until(hours, zone, instant + (until - instant) * part / 20) == until
    assert quiet_until(hours, zone, until - timedelta(microseconds=1)) == until


@pytest.mark.parametrize(
    ("hours", "local", "until"),
    [
        pytest.param(NIGHT, "2026-11-25T21:59+01:00", None, id="before"),
        pytest.param(NIGHT, "2026-11-25T22:00+01:00", "2026-11-26T07:00+01:00", id="the start is within"),
        pytest.param(NIGHT, "2026-11-26T07:00+01:00", None, id="the end is outside"),
        pytest.param(NIGHT, "2026-03-28T23:00+01:00", "2026-03-29T07:00+02:00", id="a night of eight hours"),
        pytest.param(NIGHT, "2026-10-24T23:00+02:00", "2026-10-25T07:00+01:00", id="a night of ten hours"),
        pytest.param(
            QuietHours(time(22), time(2, 30)), "2026-03-29T01:59+01:00", "2026-03-29T03:00+02:00", id="no end: the jump"
        ),
        pytest.param(
            QuietHours(time(2, 30), time(6)),
            "2026-03-29T03:00+02:00",
            "2026-03-29T06:00+02:00",
            id="no start: the jump",
        ),
        pytest.param(
            QuietHours(time(22), time(2, 30)), "2026-10-25T02:45+02:00", "2026-10-25T02:30+01:00", id="the last end"
        ),
        pytest.param(
            QuietHours(time(2, 30), time(6)), "2026-10-25T02:15+01:00", "2026-10-25T06:00+01:00", id="the first start"
        ),
        pytest.param(
            QuietHours(time(0), time(0), frozenset({6, 7})),
            "2026-11-28T12:00+01:00",
            "2026-11-30T00:00+01:00",
            id="days that touch are one",
        ),
    ],
)
def test_in_berlin(hours: QuietHours, local: str, until: str | None) -> None:
    expected = datetime.fromisoformat(until) if until else None
    assert quiet_until(hours, BERLIN, datetime.fromisoformat(local)) == expected


def documented() -> list[tuple[str, ...]]:
    """The rows of the table in the docs: zone, hours, when something is due, when it is sent."""
    text = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if "|" in line]
    return [row for row in rows if " to " in row[1] and "/" in row[0]]


def test_the_docs_have_examples() -> None:
    assert len(documented()) >= 10


@pytest.mark.parametrize(("zone", "between", "due", "sent"), documented())
def test_as_the_docs_say(zone: str, between: str, due: str, sent: str) -> None:
    start, end = map(time.fromisoformat, between.split(" to "))
    instant, place = datetime.fromisoformat(due), ZoneInfo(zone)
    local = (quiet_until(QuietHours(start, end), place, instant) or instant).astimezone(place)
    assert local.isoformat(timespec="minutes") == sent


def test_a_day_that_a_zone_left_out_ends_no_night() -> None:
    # Apia went from Thursday evening, 29 December 2011, to Saturday.
    apia = ZoneInfo("Pacific/Apia")
    evening = datetime(2011, 12, 29, 23, tzinfo=apia)
    assert quiet_until(NIGHT, apia, evening) == datetime(2011, 12, 31, 7, tzinfo=apia)


@pytest.mark.parametrize(
    ("hours", "instant", "until"),
    [
        (QuietHours(time(23, 45), time(23, 30), frozenset({5})), "2010-11-07T00:00:30-02:30", "2010-11-06T23:30-03:30"),
        (QuietHours(time(0), time(6), frozenset({7})), "2010-11-06T23:30-03:30", "2010-11-07T06:00-03:30"),
    ],
)
def test_clocks_that_are_set_back_over_midnight(hours: QuietHours, instant: str, until: str) -> None:
    # Newfoundland, Sunday, 7 November 2010: a minute after midnight it was a minute past eleven on Saturday again.
    zone = ZoneInfo("America/St_Johns")
    assert quiet_until(hours, zone, datetime.fromisoformat(instant)) == datetime.fromisoformat(until)


@pytest.mark.parametrize("weekdays", [frozenset(), frozenset({0}), EVERY_DAY])
def test_hours_that_mean_nothing_or_never_end_are_refused(weekdays: frozenset[int]) -> None:
    with pytest.raises(ValueError, match=r"weekdays|weekday"):
        QuietHours(time(8), time(8), weekdays)
