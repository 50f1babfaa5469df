"""Channels carry messages to the other side. Each knows one protocol and nothing of the database.

A channel tells how an attempt went by its Outcome and raises nothing that it can name; it may be called by many tasks
at once. The caller bounds the time of an attempt by cancelling it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from notification_service.domain import Result

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
