"""The fault switches: what each breaks, and how."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from notification_service import retries
from notification_service.channels import Message, Outcome
from notification_service.channels.email import EmailChannel
from notification_service.channels.webhook import WebhookChannel
from notification_service.compose import Composer
from notification_service.domain import Ended, Notification, Result, State
from notification_service.store import leases, writes
from tests.faultrun.switches import Switch, once_in, put, switch
from tidings.users.v1 import users_pb2

SWITCHES: dict[str, Switch] = {}
_switch = partial(switch, SWITCHES)


# How deliveries end


def _break_ends(spoil: Callable[[Ended], Ended]) -> None:
    decide = retries.decide

    def broken(*arguments: Any, **named: Any) -> Ended:
        return spoil(decide(*arguments, **named))

    put(retries, "decide", broken)


@_switch("Ended", "parks without a reason")
def _shrugs() -> None:
    _break_ends(lambda ended: replace(ended, reason=""))


@_switch("Ended", "tries some again in a year")
def _dallies() -> None:
    def spoil(ended: Ended) -> Ended:
        return replace(ended, delay=2_000_000.0) if ended.state is State.PENDING and once_in(20) else ended

    _break_ends(spoil)


# What is made of events


def _break_composing(spoil: Callable[[Notification], Notification]) -> None:
    compose = Composer.compose

    def broken(self: Composer, events: Sequence[users_pb2.UserEvent]) -> list[Notification]:
        return [spoil(one) for one in compose(self, events)]

    put(Composer, "compose", broken)


@_switch("Complete", "leaves out the last delivery of some notifications")
def _drops() -> None:
    _break_composing(lambda made: replace(made, deliveries=made.deliveries[:-1]) if once_in(50) else made)


@_switch("Complete", "makes nothing of some events")
def _overlooks() -> None:
    compose = Composer.compose

    def broken(self: Composer, events: Sequence[users_pb2.UserEvent]) -> list[Notification]:
        return compose(self, [event for event in events if not once_in(50)])

    put(Composer, "compose", broken)


@_switch("Dense", "skips positions")
def _skips() -> None:
    arrays = writes._notification_arrays

    def broken(made: Sequence[Notification]) -> dict[str, Any]:
        more = len(made) + once_in(10)
        return {**arrays(made), "more_notifications": more}

    put(writes, "_notification_arrays", broken)


# What is sent


def _break_sending(broken: Callable[[Callable[[Message], Any], Message], Any]) -> None:
    for channel in (EmailChannel, WebhookChannel):
        send = channel.send

        def wrapped(self: Any, message: Message, send: Any = send) -> Any:
            return broken(lambda changed: send(self, changed), message)

        put(channel, "send", wrapped)


@_switch("Known", "takes some for sent that it has not sent")
def _believes() -> None:
    async def broken(send: Callable[[Message], Any], message: Message) -> Outcome:
        made: Outcome = Outcome(Result.SUCCEEDED, 250) if once_in(50) else await send(message)
        return made

    _break_sending(broken)


@_switch("Known", "sends with a key of the attempt")
def _renames() -> None:
    async def broken(send: Callable[[Message], Any], message: Message) -> Outcome:
        key = message.idempotency_key
        if once_in(50):
            key = f"<{uuid.uuid4()}@other.example>" if key.startswith("<") else str(uuid.uuid4())
        made: Outcome = await send(replace(message, idempotency_key=key))
        return made

    _break_sending(broken)


@_switch("Same", "sends other bytes at each attempt")
def _rewrites() -> None:
    async def broken(send: Callable[[Message], Any], message: Message) -> Outcome:
        # Blanks at the end of JSON mean nothing, but they are other bytes; in a mail's text they are visible.
        content = message.content.replace(b'"text": "', b'"text": "' + b"x" * random.randrange(9))
        made: Outcome = await send(replace(message, content=content + b" " * random.randrange(9)))
        return made

    _break_sending(broken)


@_switch("Excused", "doubts what was answered")
def _doubts() -> None:
    async def broken(send: Callable[[Message], Any], message: Message) -> Outcome:
        made: Outcome = await send(message)
        return Outcome(Result.FAILED) if made.result is Result.SUCCEEDED and once_in(20) else made

    _break_sending(broken)


@_switch("Ordered", "lets later deliveries pass")
def _overtakes() -> None:
    for name in ("_PICK", "_PICK_OF_TARGETS"):
        statement = getattr(leases, name)
        waits = "earlier.position < due.position"
        assert waits in statement
        put(leases, name, statement.replace(waits, f"{waits} AND false"))
