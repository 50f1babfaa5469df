"""What the client prints, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.harness import ServiceProcess, until

# A message as the client prints it, with the number of its connection.
Printed = dict[str, Any]


def messages_of(watcher: ServiceProcess) -> list[Printed]:
    """Its messages so far."""
    return [record for record in watcher.records if "connection" in record]


def events_of(messages: Iterable[Printed]) -> list[Printed]:
    """Events that a token has passed: what a connection leaves of an atomic group comes again with the next one."""
    passed: list[Printed] = []
    waiting: list[Printed] = []
    connection = None
    for message in messages:
        if message["connection"] != connection:
            waiting, connection = [], message["connection"]
        waiting += message["events"]
        if message["resume_token"]:
            passed += waiting
            waiting = []
    return passed


def positions_of(messages: Iterable[Printed]) -> list[int]:
    """Of the same events."""
    return [int(event["position"]) for event in events_of(messages)]


def marks_of(messages: Iterable[Printed]) -> list[str]:
    """In the order in which they came."""
    return [message["mark"] for message in messages if "mark" in message]


def caught_up(messages: list[Printed]) -> bool:
    """Whether the stream was live at a time."""
    return "caught_up" in marks_of(messages)


def passed(position: int) -> Callable[[list[Printed]], bool]:
    """Enough is what goes up to a position."""
    return lambda messages: bool(messages) and int(messages[-1]["position"]) >= position


def told(position: int) -> Callable[[list[Printed]], bool]:
    """Enough is what has the event of a position."""
    return lambda messages: position in positions_of(messages)


async def wait_printed(watcher: ServiceProcess, enough: Callable[[list[Printed]], bool]) -> list[Printed]:
    """What it has printed once that is enough."""

    def found() -> list[Printed] | None:
        assert watcher.alive, watcher.tail()
        messages = messages_of(watcher)
        return messages if enough(messages) else None

    printed: list[Printed] = await until(found, timeout=60)
    return printed


async def refusal(watcher: ServiceProcess) -> tuple[int, str]:
    """Its exit code and its last words."""
    await watcher.launch()
    return await watcher.wait(), watcher.lines[-1]
