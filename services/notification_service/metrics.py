"""What the notification service measures: how far it is in the feed, and how its deliveries go."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from notification_service.domain import CARRIERS, Hold, Result
from servicekit.instruments import LONG_SECONDS, Counter, Gauge, Histogram, Instrument
from tidings.client import Batch
from tidings.users.v1 import users_pb2

# Those that something leaves by.
CHANNELS = CARRIERS
_CHANNEL = "tidings.channel"
_SHARD = "tidings.shard"
_TIMED = 7  # the version of UUIDs that begin with a time

CONSUMED = Counter(
    "messaging.client.consumed.messages",
    "{message}",
    "Events processed: what became of them is stored.",
    "messaging.destination.name",
)
PROCESS = Histogram("messaging.process.duration", "s", "Batches of events, from their receipt until they are stored.")
COMMIT_TO_PROCESSED = Histogram(
    "tidings.feed.commit_to_processed",
    "s",
    "For each event: from its commit to when what became of it was stored.",
    bounds=LONG_SECONDS,
)
POSITION = Gauge(
    "tidings.inbox.position",
    "{position}",
    "The newest position up to which all is processed. Who does not follow the whole feed knows it as of 10 s ago at "
    "most.",
)
LAG_EVENTS = Gauge(
    "tidings.inbox.lag.events",
    "{event}",
    "Positions between the feed's head, as it was last told, and what is processed. Of the replica that follows the "
    "shard.",
    _SHARD,
)
LAG_TIME = Gauge(
    "tidings.inbox.lag.time",
    "s",
    "The age of the first event that was received and is not processed; while none is received but the head is ahead, "
    "the age of the last that is processed; else 0. Of the replica that follows the shard.",
    _SHARD,
)
ATTEMPTS = Counter(
    "tidings.delivery.attempts",
    "{attempt}",
    "Attempts to deliver: `succeeded`, `failed` (to be tried again), `refused` (for good).",
    _CHANNEL,
    "tidings.outcome",
)
DURATION = Histogram("tidings.delivery.duration", "s", "Attempts to deliver, whatever came of them.", _CHANNEL)
COMMIT_TO_DELIVERED = Histogram(
    "tidings.delivery.commit_to_delivered",
    "s",
    "For each delivery that succeeded: from the commit of its event, by the time in the event's id, to the answer.",
    _CHANNEL,
    bounds=LONG_SECONDS,
)
PENDING = Gauge("tidings.deliveries.pending", "{delivery}", "Deliveries not done, as of 10 s ago at most.", _CHANNEL)
PARKED = Gauge("tidings.deliveries.parked", "{delivery}", "Parked deliveries, as of 10 s ago at most.", _CHANNEL)
OLDEST_PENDING_AGE = Gauge(
    "tidings.deliveries.oldest_pending_age",
    "s",
    "The age of the oldest delivery that is tried, or 0; not of what waits for quiet hours, another or an endpoint.",
    _CHANNEL,
)
PAUSED = Gauge(
    "tidings.delivery.paused",
    "{destination}",
    "1 while the breaker of a mail provider or webhook endpoint is open: what goes there waits and uses up no tries.",
    _CHANNEL,
    "tidings.destination",
)
ENDPOINTS = Gauge(
    "tidings.endpoints", "{endpoint}", "Webhook endpoints: `enabled`, `disabled`.", "tidings.endpoint.state"
)
ENDPOINTS_GONE = Counter(
    "tidings.endpoints.gone", "{endpoint}", "Webhook endpoints that were disabled because they answered 410 Gone."
)
TEMPLATES_REFUSED = Gauge(
    "tidings.templates.refused",
    "{problem}",
    "Problems for which the files that the operator's folder of templates has now are not used; 0 if they are.",
)
UNSUBSCRIBES = Counter(
    "tidings.unsubscribes",
    "{request}",
    "What readers of mails asked for by a link: `one_click` by their mail program, `category`, `all` on the page, and "
    "`category_undone`, `all_undone`. `unchanged`: it was so already; `refused`: mandatory, or an address that is not "
    "known any more; `failed`: the database is away.",
    "tidings.unsubscribe.kind",
    "tidings.outcome",
)
RECIPIENTS_LAG = Gauge(
    "tidings.recipients.lag.events",
    "{event}",
    "Positions between the user feed's head, as it was last told, and what this service's own copy of the users has. "
    "Of the replica that keeps the copy.",
)
RECIPIENTS_LAG_TIME = Gauge(
    "tidings.recipients.lag.time",
    "s",
    "The age of the first event that was received for this copy and is not in it; while none is received but the head "
    "is ahead, the age of the last that is in it; else 0. Of the replica that keeps the copy.",
)
RECIPIENTS_SILENCE = Gauge(
    "tidings.recipients.silence",
    "s",
    "For how long nothing was stored for this copy, neither news nor a part of a snapshot nor that there is no news, "
    "as of 10 s ago at most.",
)
REMOVED = Counter(
    "tidings.retention.removed",
    "{row}",
    "What was kept for as long as it is, and was removed: `notifications`, `sends`, `digests`, `deleted_users`.",
    "tidings.retention.kind",
)
SENDS = Gauge("tidings.sends", "{send}", "Sends by state, as of 10 s ago at most.", "tidings.send.state")
SEND_RECIPIENTS = Counter(
    "tidings.send.recipients",
    "{recipient}",
    "Recipients of sends that were passed: `made` a notification, or skipped, by why.",
    "tidings.outcome",
)
DIGESTS_OPEN = Gauge("tidings.digests.open", "{digest}", "Digests whose window is open, as of 10 s ago at most.")
DIGEST_ITEMS = Counter("tidings.digests.items", "{item}", "Mails that were gathered by digests.")
DIGESTS_OVERDUE = Gauge(
    "tidings.digests.overdue",
    "s",
    "For how long the digest that is due the longest has been so and is not closed, or 0, as of 10 s ago at most.",
)

INSTRUMENTS: tuple[Instrument, ...] = (
    CONSUMED,
    PROCESS,
    COMMIT_TO_PROCESSED,
    POSITION,
    LAG_EVENTS,
    LAG_TIME,
    ATTEMPTS,
    DURATION,
    COMMIT_TO_DELIVERED,
    PENDING,
    PARKED,
    OLDEST_PENDING_AGE,
    PAUSED,
    ENDPOINTS,
    ENDPOINTS_GONE,
    TEMPLATES_REFUSED,
    UNSUBSCRIBES,
    RECIPIENTS_LAG,
    RECIPIENTS_LAG_TIME,
    RECIPIENTS_SILENCE,
    REMOVED,
    SENDS,
    SEND_RECIPIENTS,
    DIGESTS_OPEN,
    DIGEST_ITEMS,
    DIGESTS_OVERDUE,
)

_consumed = CONSUMED.of("user_events")
_process = PROCESS.of()
_endpoints_gone = ENDPOINTS_GONE.of()
_digest_items = DIGEST_ITEMS.of()
_commit_to_processed = COMMIT_TO_PROCESSED.of()


class _Place:
    """How far a shard, or the copy of the users, is that this process follows. Times are in seconds since 1970."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.head = position
        # The commit time of the first event in hand, and of the last that is processed.
        self.in_hand: float | None = None
        self.last: float | None = None

    def lag_events(self) -> int:
        """See LAG_EVENTS."""
        return max(self.head - self.position, 0)

    def lag_time(self) -> float | None:
        """See LAG_TIME."""
        if self.lag_events() == 0:
            return 0.0
        since = self.in_hand or self.last
        return None if since is None else max(time.time() - since, 0.0)


class _Inbox:
    """What this process knows of the inbox."""

    def __init__(self) -> None:
        # By shard.
        self.places: dict[int, _Place] = {}
        # As the database was last asked, and whether the one shard that is followed here is the whole feed.
        self.position: int | None = None
        self.is_whole = True

    def lowest(self) -> int | None:
        """See POSITION."""
        places = list(self.places.values())
        return places[0].position if places and self.is_whole else self.position

    def lags(self) -> list[tuple[tuple[str], float]]:
        """See LAG_EVENTS."""
        return [((str(shard),), one.lag_events()) for shard, one in list(self.places.items())]

    def late(self) -> list[tuple[tuple[str], float]]:
        """See LAG_TIME."""
        found = [(shard, one.lag_time()) for shard, one in list(self.places.items())]
        return [((str(shard),), lag) for shard, lag in found if lag is not None]


_inbox = _Inbox()
POSITION.read_one(_inbox.lowest)
LAG_EVENTS.read = _inbox.lags
LAG_TIME.read = _inbox.late


@contextmanager
def processing(hold: Hold | None, position: int, batch: Batch) -> Iterator[None]:
    """Measures a batch that follows a position, of a shard or of the whole feed. One that fails stays in hand: its
    events are still to be processed.
    """
    times = [_committed(event) for event in batch.events]
    _inbox.is_whole = hold is None or hold.of == 1
    place = _inbox.places.setdefault(hold.shard if hold else 0, _Place(position))
    place.position, place.head = position, max(batch.head_position, batch.position)
    place.in_hand = times[0] if times else None
    began = time.perf_counter()
    yield
    now = time.time()
    if times:
        _process.record(time.perf_counter() - began)
    _consumed.add(len(times))
    for committed in times:
        # The clock of the feed's database may be a little ahead of ours.
        _commit_to_processed.record(max(now - committed, 0.0))
    place.position, place.in_hand, place.last = batch.position, None, times[-1] if times else place.last


def _committed(event: users_pb2.UserEvent) -> float:
    stamp = event.commit_time
    return stamp.seconds + stamp.nanos / 1e9


def leaves(shard: int) -> None:
    """This process does not follow a shard any more."""
    _inbox.places.pop(shard, None)


def unsubscribing(*kinds: str) -> None:
    """Links are served, by which these things may be asked for: the first of each kind is a rise, too."""
    for kind in kinds:
        for outcome in ("changed", "unchanged", "refused", "failed"):
            UNSUBSCRIBES.of(kind, outcome)


def unsubscribed(kind: str, outcome: str) -> None:
    """Somebody asked for something by a link."""
    UNSUBSCRIBES.of(kind, outcome).add(1)


def endpoint_gone() -> None:
    """An endpoint was disabled because it answered 410."""
    _endpoints_gone.add(1)


def gathered(items: int) -> None:
    """Mails were gathered by digests instead of being delivered by themselves."""
    if items:
        _digest_items.add(items)


def attempted(channel: str, result: Result, began: float, event_id: uuid.UUID) -> None:
    """An attempt to deliver what became of an event, begun at a time of `time.perf_counter`, has ended."""
    ATTEMPTS.of(channel, result.name.lower()).add(1)
    DURATION.of(channel).record(time.perf_counter() - began)
    # The id of an event is drawn a moment before its commit: a UUIDv7, which begins with milliseconds.
    if result is Result.SUCCEEDED and event_id.version == _TIMED:
        COMMIT_TO_DELIVERED.of(channel).record(max(time.time() - (event_id.int >> 80) / 1000, 0.0))


class Deliveries:
    """How deliveries stand, as the database was last asked."""

    def __init__(self) -> None:
        # By channel: how many are pending, how many parked, and since when the oldest waits, by `time.monotonic`.
        self._found: dict[str, tuple[int, int, float | None]] = {}
        # From the start on: the first of its kind is a rise, too.
        for channel in CHANNELS:
            for result in (Result.SUCCEEDED, Result.FAILED, Result.REFUSED):
                ATTEMPTS.of(channel, result.name.lower())
        PENDING.read = lambda: [((channel,), pending) for channel, (pending, _, _) in self._found.items()]
        PARKED.read = lambda: [((channel,), parked) for channel, (_, parked, _) in self._found.items()]
        OLDEST_PENDING_AGE.read = lambda: [
            ((channel,), 0.0 if since is None else time.monotonic() - since)
            for channel, (_, _, since) in self._found.items()
        ]

    def found(self, standing: Sequence[tuple[str, int, int, float | None]], position: int) -> None:
        """Takes `(channel, pending, parked, age of the oldest pending in seconds)`, and the position of the inbox."""
        now = time.monotonic()
        found: dict[str, tuple[int, int, float | None]] = dict.fromkeys(CHANNELS, (0, 0, None))
        for channel, pending, parked, age in standing:
            if channel in found:
                found[channel] = (pending, parked, None if age is None else now - age)
        self._found = found
        _inbox.position = position


class _Recipients:
    """How far the copy of the users is, if this process keeps it."""

    def __init__(self) -> None:
        self.place: _Place | None = None


_recipients = _Recipients()
RECIPIENTS_LAG.read_one(lambda: _recipients.place.lag_events() if _recipients.place else None)
RECIPIENTS_LAG_TIME.read_one(lambda: _recipients.place.lag_time() if _recipients.place else None)


@contextmanager
def copying(position: int | None, batch: Batch, *, inside: bool) -> Iterator[Callable[[int | None], None]]:
    """Measures a batch that is stored in the copy of the users, which is as of a position, None if it is not whole yet.
    Gives whom to tell the position afterwards. What fails stays in hand. Of what is `inside` of a snapshot the times
    say nothing.
    """
    times = [] if inside else [_committed(event) for event in batch.events]
    place = _recipients.place = _recipients.place or _Place(position or 0)
    place.position, place.head = position or 0, max(batch.head_position, batch.position)
    place.in_hand = times[0] if times else None

    def stored(after: int | None) -> None:
        place.position, place.in_hand, place.last = after or 0, None, times[-1] if times else place.last

    yield stored


def recipients_left() -> None:
    """This process does not keep the copy of the users any more."""
    _recipients.place = None


def removed(**counts: int) -> None:
    """So many rows of each kind were removed, for they are no longer kept."""
    for kind, count in counts.items():
        REMOVED.of(kind).add(count)


def expanded(**outcomes: int) -> None:
    """So many recipients of a send were passed, by what came of each."""
    for outcome, count in outcomes.items():
        SEND_RECIPIENTS.of(outcome).add(count)


class Copy:
    """How the copy of the users stands, as the database was last asked."""

    def __init__(self) -> None:
        # Since when it is silent, by `time.monotonic`; None before anybody has begun to keep it.
        self._since: float | None = None
        RECIPIENTS_SILENCE.read_one(lambda: None if self._since is None else time.monotonic() - self._since)

    def found(self, silence: float | None) -> None:
        """Takes for how many seconds nothing was stored."""
        self._since = None if silence is None else time.monotonic() - silence


class Sends:
    """How sends stand, as the database was last asked."""

    def __init__(self) -> None:
        self._found: Mapping[str, int] = {}
        # From the start on: the first of its kind is a rise, too.
        for outcome in ("made", "unknown", "deleted", "no_address", "not_composed"):
            SEND_RECIPIENTS.of(outcome)
        SENDS.read = lambda: [((state,), float(count)) for state, count in self._found.items()]

    def found(self, standing: Mapping[str, int]) -> None:
        """Takes how many there are by state."""
        self._found = standing


class Digests:
    """How digests stand, as the database was last asked."""

    def __init__(self) -> None:
        self._open, self._overdue = 0, 0.0
        DIGESTS_OPEN.read_one(lambda: self._open)
        DIGESTS_OVERDUE.read_one(lambda: self._overdue)

    def found(self, opened: int, overdue: float) -> None:
        """Takes how many are open, and for how many seconds one has been due."""
        self._open, self._overdue = opened, overdue
