"""Quiet hours: when somebody is left alone, and when that ends.

The hours of a day begin the first time that the clocks of the zone show their start, and end the last time that these
show their end, which is on the next day unless it is later than the start. So when clocks are set back, both passes of
the repeated hour are quiet. A start or end that is jumped over counts as the moment of the jump. Hours that touch or
overlap are one: what falls in them waits for the first instant outside all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

EVERY_DAY = frozenset(range(1, 8))

# Clocks that are set back over midnight show the date of tomorrow for a moment, and then today's again: hours of two
# days before may last, and those of the next day have begun.
_DAYS_BEFORE = 2
_DAYS_AFTER = 1
# More windows than can touch: six weekdays, and a week more for a zone that leaves out the seventh.
_MOST_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class QuietHours:
    """From `start` to `end` (local times, whole minutes) on each of `weekdays` (1 Monday to 7 Sunday), by the day on
    which they begin. Equal times are a whole day, and then one weekday at least is left out; else ValueError.
    """

    start: time
    end: time
    weekdays: frozenset[int] = EVERY_DAY

    def __post_init__(self) -> None:
        if not self.weekdays or not self.weekdays <= EVERY_DAY:
            raise ValueError("weekdays: one or more of 1 (Monday) to 7 (Sunday)")
        if self.start == self.end and self.weekdays == EVERY_DAY:
            raise ValueError("whole days on every weekday would never end")


def quiet_until(hours: QuietHours, zone: ZoneInfo, instant: datetime) -> datetime | None:
    """The first instant (UTC) at or after `instant` that is outside the hours; None if `instant` itself is outside."""
    moment = instant.astimezone(UTC)
    for _ in range(_MOST_WINDOWS):
        end = _end_of_window(hours, zone, moment)
        if end is None:
            break
        moment = end
    return moment if moment > instant else None


def _end_of_window(hours: QuietHours, zone: ZoneInfo, moment: datetime) -> datetime | None:
    today = moment.astimezone(zone).date()
    ends = []
    for offset in range(-_DAYS_BEFORE, _DAYS_AFTER + 1):
        day = today + timedelta(days=offset)
        if day.isoweekday() in hours.weekdays:
            start, end = _window(hours, zone, day)
            if start <= moment < end:
                ends.append(end)
    return max(ends, default=None)


def _window(hours: QuietHours, zone: ZoneInfo, day: date) -> tuple[datetime, datetime]:
    last = day if hours.end > hours.start else day + timedelta(days=1)
    return (
        instant_of(datetime.combine(day, hours.start), zone, fold=0),
        instant_of(datetime.combine(last, hours.end), zone, fold=1),
    )


def instant_of(wall: datetime, zone: ZoneInfo, *, fold: int) -> datetime:
    """When the clocks show `wall`: the first time (fold 0), the last (fold 1), or when they jump over it."""
    instant = wall.replace(tzinfo=zone, fold=fold).astimezone(UTC)
    if instant.astimezone(zone).replace(tzinfo=None) == wall:
        return instant
    # In a gap the two readings lie on both sides of the jump: with the offset after it, and with the one before.
    low = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    seconds = int((wall.replace(tzinfo=zone, fold=0).astimezone(UTC) - low).total_seconds())
    first, last = 0, seconds
    while first < last:
        middle = (first + last) // 2
        if (low + timedelta(seconds=middle)).astimezone(zone).replace(tzinfo=None) >= wall:
            last = middle
        else:
            first = middle + 1
    return low + timedelta(seconds=first)
