"""What one stream of WatchUsers has told its client, and what it owes it: a chain of positions, and tokens in time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from user_service import events
from user_service.messages import Message


@dataclass(slots=True)
class Track:
    """`sent` is the position of the last message. The newest `token` stands at `position`: all that is selected up to
    there has been sent. Inside an atomic group `sent` is beyond it, and no token is offered. `due` is when one must
    be, in the loop's time; `interval` is in seconds.
    """

    interval: float
    position: int
    token: str
    sent: int
    due: float = 0.0

    @property
    def inside_group(self) -> bool:
        """Whether a part of an atomic group was sent, and the rest is still to be looked at."""
        return self.sent > self.position

    @property
    def is_due(self) -> bool:
        """Whether a token must be offered."""
        return not self.inside_group and asyncio.get_running_loop().time() >= self.due

    def mark(self, **mark: Any) -> bytes:
        """A message without events, or the tail of one of a snapshot: it goes to where the token stands."""
        token, position = ("", self.sent) if self.inside_group else (self.token, self.position)
        data = events.tail(token, self.sent, position, **mark)
        self._send(position, token)
        return data

    def take(self, message: Message) -> bytes:
        """The bytes of a message as this stream sends it; none if nothing is selected."""
        data = message.following(self.sent) if message.data else b""
        if message.token:
            self.position, self.token = message.position, message.token
        if data:
            self._send(message.position, message.token)
        return data

    def _send(self, position: int, token: str) -> None:
        self.sent = position
        if token:
            self.due = asyncio.get_running_loop().time() + self.interval
