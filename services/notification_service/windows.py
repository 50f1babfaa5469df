"""Windows: which digest a mail goes into, and when that closes.

Pure: what is gathered is decided from the windows that are open and the mails of one batch, in their order. A user has
one window at a time for each digest and address. It opens with its first item, and takes further ones until it has as
many as it may have or is closed; then the next item opens another.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from notification_service import domain
from notification_service.domain import USER_DELETED, DigestState, Item, Notification
from notification_service.preferences import zone
from notification_service.quiet_hours import instant_of
from notification_service.rules import Digest

# Clocks that are set over midnight show a date twice, or a day late: these days around one have the next closing time.
_DAYS = range(-2, 4)

_Key = tuple[uuid.UUID, str, str]


@dataclass(frozen=True, slots=True)
class Window:
    """A digest that is open, or was when the batch began. Times are UTC."""

    id: uuid.UUID
    user_id: uuid.UUID
    name: str
    target: str
    category: str
    template: str
    locale: str
    time_zone: str
    gathers: bool
    items: int
    open_time: datetime
    close_time: datetime
    # Of the first item.
    event_id: uuid.UUID
    event_position: int
    trace_parent: str
    trace_state: str
    state: DigestState = DigestState.OPEN
    end_reason: str = ""

    @property
    def key(self) -> _Key:
        """What one window at a time is for."""
        return self.user_id, self.name, self.target


@dataclass(frozen=True, slots=True)
class Placed:
    """An item's place in a digest."""

    digest_id: uuid.UUID
    number: int
    notification_id: uuid.UUID
    view: str


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a batch makes of the windows: those that are new, those that became others, and what went into them. Of the
    notifications those with items know their digest.
    """

    opened: tuple[Window, ...]
    changed: tuple[Window, ...]
    placed: tuple[Placed, ...]
    notifications: tuple[Notification, ...]


def closes(digest: Digest, time_zone: str, opened: datetime) -> datetime:
    """When a window closes (UTC) that opens at an instant, for a user of a time zone (IANA; UTC if it has none)."""
    if digest.at is not None:
        return next_local(digest.at, zone(time_zone), opened)
    return opened.astimezone(UTC) + digest.window


def next_local(at: time, where: ZoneInfo, after: datetime) -> datetime:
    """The first instant (UTC) after another at which the clocks of a zone show a time for the first time on their day,
    or jump over it.
    """
    today = after.astimezone(where).date()
    days = (today + timedelta(days=offset) for offset in _DAYS)
    instants = (instant_of(datetime.combine(day, at), where, fold=0) for day in days)
    return min(instant for instant in instants if instant > after)


def gather(
    made: Sequence[Notification],
    deleted: Mapping[uuid.UUID, int],
    opened: Sequence[Window],
    digests: Mapping[str, Digest],
    now: datetime,
) -> Gathered:
    """Places the items of new notifications. `deleted` has the position of each user's deletion: what was gathered
    before it is cancelled. `opened` are all open windows of the users of both.
    """
    before = {one.id: one for one in opened}
    windows = dict(before)
    gathering = {one.key: one.id for one in opened if one.gathers}
    placed: list[Placed] = []
    notifications: list[Notification] = []

    def is_over(window: Window) -> bool:
        return window.event_position < deleted.get(window.user_id, 0)

    for one in made:
        first: uuid.UUID | None = None
        for item in one.items:
            key = one.user_id, item.digest, item.target
            identity = gathering.get(key)
            # What comes after the deletion is not gathered with what came before it.
            if identity is not None and is_over(windows[identity]) and one.event_position >= deleted[one.user_id]:
                windows[identity] = replace(windows[identity], gathers=False)
                identity = None
            if identity is None:
                window = _opened(one, item, digests[item.digest], now)
            else:
                window = _with(windows[identity], one, item, digests[item.digest], now)
            windows[window.id] = window
            if window.gathers:
                gathering[key] = window.id
            else:
                gathering.pop(key, None)
            placed.append(Placed(window.id, window.items, one.id, item.view))
            first = first or window.id
        notifications.append(replace(one, digest_id=first) if first else one)
    for window in list(windows.values()):
        if is_over(window):
            windows[window.id] = replace(window, state=DigestState.CANCELLED, gathers=False, end_reason=USER_DELETED)
    return Gathered(
        tuple(window for window in windows.values() if window.id not in before),
        tuple(window for window in windows.values() if before.get(window.id, window) != window),
        tuple(placed),
        tuple(notifications),
    )


def _opened(one: Notification, item: Item, digest: Digest, now: datetime) -> Window:
    is_full = digest.most == 1
    return Window(
        id=domain.digest_id(one.id, item.digest, item.target),
        user_id=one.user_id,
        name=item.digest,
        target=item.target,
        category=one.category,
        template=digest.template,
        locale=item.locale,
        time_zone=one.time_zone,
        gathers=not is_full,
        items=1,
        open_time=now,
        close_time=now if is_full else closes(digest, one.time_zone, now),
        event_id=one.event_id,
        event_position=one.event_position,
        trace_parent=one.trace_parent,
        trace_state=one.trace_state,
    )


def _with(window: Window, one: Notification, item: Item, digest: Digest, now: datetime) -> Window:
    """A window that has one more item."""
    is_full = window.items + 1 >= digest.most
    return replace(
        window,
        category=one.category,
        template=digest.template,
        locale=item.locale,
        time_zone=one.time_zone,
        gathers=not is_full,
        items=window.items + 1,
        close_time=min(window.close_time, now) if is_full else window.close_time,
    )
