"""The example of docs/channels.md: pages over TCP, one JSON line out and one line back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

from notification_service.channels import Draft, Message, Outcome, Says, outcome
from notification_service.domain import Delivery, Result, delivery_id
from notification_service.templates import RenderError

PAGER = "pager"


class PagerWriter:
    """Makes a page to each address that a rule names: the subject of its template."""

    says = Says.TEXT

    def compose(self, draft: Draft) -> Iterator[Delivery]:
        """See Writer."""
        for one in {one.email: one for one in draft.addressees if one.email}.values():
            identity = delivery_id(draft.id, PAGER, one.email)
            try:
                content = draft.say(one.which).subject.encode()
            except RenderError as error:
                yield Delivery(identity, PAGER, one.email, str(identity), problem=str(error))
            else:
                yield Delivery(identity, PAGER, one.email, str(identity), content)


class PagerChannel:
    """Sends each page on a connection of its own, so there is nothing to keep."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    async def send(self, message: Message) -> Outcome:
        """Makes one attempt."""
        page = {"id": message.idempotency_key, "to": message.target, "text": message.content.decode()}
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(json.dumps(page).encode() + b"\n")
                await writer.drain()
                answer = (await reader.readline()).decode(errors="replace")
            finally:
                writer.close()
        except (OSError, ValueError) as error:  # readline raises ValueError for a line without end
            return outcome(Result.FAILED, 0, f"{type(error).__name__}: {error}", outage=True)
        verb, _, said = answer.partition(" ")
        if not answer.endswith("\n") or verb not in ("OK", "NO", "LATER"):
            return outcome(Result.FAILED, 0, f"no whole answer: {answer}", outage=True)
        if verb == "LATER":
            seconds = said.strip()
            return outcome(Result.FAILED, 0, "asked to wait", float(seconds) if seconds.isdecimal() else None)
        return outcome(Result.SUCCEEDED if verb == "OK" else Result.REFUSED, 0, said)

    async def close(self) -> None:
        """Nothing is held between attempts."""
