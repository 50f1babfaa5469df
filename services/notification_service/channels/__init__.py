"""Channels: how notifications reach people and machines. Each is one file here, which says two things.

Its Writer makes deliveries of a notification: to whom, and what they carry. It is pure. Its Channel carries them to
the other side: it knows one protocol and nothing of the database, tells how an attempt went by an Outcome and raises
nothing that it can name; it may be called by many tasks at once. The caller bounds the time of an attempt by cancelling
it.

The in-app stream is no such channel: there the notification itself is what is shown.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Protocol

from notification_service.domain import Delivery, Result
from notification_service.templates import Rendered

_LONGEST_DETAIL = 500


@dataclass(frozen=True, slots=True)
class Message:
    """One attempt: what to carry, to whom, and the key that lets the other side tell a repetition."""

    target: str
    idempotency_key: str
    content: bytes
    create_time: datetime
    trace_parent: str = ""
    trace_state: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt went; `retry_after` (seconds) is what the other side asked for.

    `outage` says that the failure is the other side's, whatever it was asked: it cannot be reached, does not answer in
    time, or says that it is not able to. So many in a row pause all that goes there.
    """

    result: Result
    code: int = 0
    detail: str = ""
    retry_after: float | None = None
    outage: bool = False


class Says(IntEnum):
    """What a channel needs of a rule's template."""

    NOTHING = 0
    # Its subject and text.
    TEXT = 1
    # Its HTML, too.
    HTML = 2


@dataclass(frozen=True, slots=True)
class Addressee:
    """Somebody to be told: by the `current` or the `previous` state of the user. An address may be empty."""

    which: str
    name: str
    email: str
    # By which who reads the mail switches off its category; empty if there is none.
    unsubscribe_url: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A notification that is being made."""

    id: uuid.UUID
    category: str
    # The type of its event, such as CREATED.
    kind: str
    addressees: Sequence[Addressee]
    # What it says to an addressee; raises RenderError. Each is rendered once, with as much as the rule's channels need.
    say: Callable[[str], Rendered]
    # It as a JSON object, for machines.
    payload: Callable[[], Mapping[str, Any]]


class Writer(Protocol):
    """What a channel makes of notifications. The same draft always makes the same deliveries."""

    @property
    def says(self) -> Says:
        """What it asks the draft to say."""
        ...

    def compose(self, draft: Draft) -> Iterator[Delivery]:
        """The deliveries, each to another target; one that cannot be made has a `problem` instead of content."""
        ...


class Channel(Protocol):
    """One way to the other side."""

    async def send(self, message: Message) -> Outcome:
        """Makes one attempt."""
        ...

    async def close(self) -> None:
        """Gives back what is held, within a second or so."""
        ...


def outcome(
    result: Result, code: int, detail: str, retry_after: float | None = None, *, outage: bool = False
) -> Outcome:
    """An outcome with a detail that can be stored: one line, bounded, without NUL."""
    return Outcome(result, code, " ".join(detail.replace("\0", "").split())[:_LONGEST_DETAIL], retry_after, outage)
