"""What the user service measures: its commits, its feed, and who follows it.

A commit is measured once for its batch and a message once when it is handed over, never for each user or event.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from servicekit.instruments import LONG_SECONDS, Counter, Gauge, Histogram, Instrument

CALLS, IMPORTS = "calls", "imports"

BATCH_SIZE = Histogram(
    "tidings.commit.batch.size",
    "{user}",
    "Users in the batches that were taken from the writer's queue.",
    "lane",
    bounds=(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
)
COMMIT_WAIT = Histogram(
    "tidings.commit.wait", "s", "From when the oldest of a batch was queued to when the batch was taken.", "lane"
)
COMMIT_DURATION = Histogram(
    "tidings.commit.duration",
    "s",
    "Transactions of the writer, waiting for the feed's lock included. `refused`: there was nothing to write; "
    "`aborted`: nothing of it is stored, it may be tried again; `unknown`: callers get OUTCOME_UNKNOWN.",
    "lane",
    "outcome",
)
QUEUE = Gauge("tidings.commit.queue", "{user}", "Users that wait for their commit.", "lane")
HEAD = Gauge("tidings.feed.head", "{position}", "The newest position that this replica knows.")
EARLIEST = Gauge("tidings.feed.earliest", "{position}", "The first position that is retained, as of 10 s ago at most.")
WINDOW_EVENTS = Gauge("tidings.feed.window.events", "{event}", "The newest events, which are in memory.")
WINDOW_BYTES = Gauge("tidings.feed.window.bytes", "By", "Their bytes; TIDINGS_USERS_WINDOW_BYTES bounds them.")
SUBSCRIBERS = Gauge("tidings.feed.subscribers", "{stream}", "Open streams of the feed.", "caller")
LAG_EVENTS = Gauge(
    "tidings.feed.subscriber.lag.events",
    "{event}",
    "Events between the head and what a caller's slowest stream was sent, also those that it does not select.",
    "caller",
)
LAG_TIME = Gauge(
    "tidings.feed.subscriber.lag.time",
    "s",
    "The age of the first event that a caller's slowest stream was not sent, 0 if there is none. Of one that is no "
    "longer in memory it is looked up every 10 s, and of one in a segment it is the age of the segment's first event.",
    "caller",
)
COMMIT_TO_SENT = Histogram(
    "tidings.feed.commit_to_sent",
    "s",
    "For each message of a live stream: from the commit of its newest event to when it was handed to gRPC.",
    bounds=LONG_SECONDS,
)
SENT = Counter(
    "messaging.client.sent.messages", "{message}", "Events sent, those of snapshots too.", "messaging.destination.name"
)

INSTRUMENTS: tuple[Instrument, ...] = (
    BATCH_SIZE,
    COMMIT_WAIT,
    COMMIT_DURATION,
    QUEUE,
    HEAD,
    EARLIEST,
    WINDOW_EVENTS,
    WINDOW_BYTES,
    SUBSCRIBERS,
    LAG_EVENTS,
    LAG_TIME,
    COMMIT_TO_SENT,
    SENT,
)

_sent = SENT.of("user_events")
_commit_to_sent = COMMIT_TO_SENT.of()


def taken(lane: str, users: int, waited: float) -> None:
    """A batch of so many users was taken from a lane, the oldest of which had waited for so many seconds."""
    BATCH_SIZE.of(lane).record(users)
    COMMIT_WAIT.of(lane).record(waited)


class Measured:
    """A transaction under way."""

    __slots__ = ("outcome",)

    def __init__(self) -> None:
        self.outcome = "committed"


@contextmanager
def committing(lane: str) -> Iterator[Measured]:
    """Measures a transaction."""
    began, measured = time.perf_counter(), Measured()
    try:
        yield measured
    except BaseException as error:
        measured.outcome = "aborted" if isinstance(error, psycopg.Error) else "unknown"
        raise
    finally:
        COMMIT_DURATION.of(lane, measured.outcome).record(time.perf_counter() - began)


def sent(events: int, newest: float = 0.0) -> None:
    """A message with so many events is handed over; `newest` is the commit time of the last, if the stream is live."""
    _sent.value += events
    if newest:
        # The clock of Postgres may be a little ahead of ours.
        _commit_to_sent.record(max(time.time() - newest, 0.0))
