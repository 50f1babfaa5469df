"""A mail server that misbehaves as its plans say: at which stage, and how.

`connections` plans what happens when somebody connects or says hello, `mails` what happens to a mail. Its protocol is
as much of RFC 5321 as a client needs to send mail, with 8BITMIME and SMTPUTF8.

    async with BadSmtp("relay") as server:
        server.mails.tell(Trouble(Stage.BODY, Act.DROP, accepted=True))
        ...  # send a mail to 127.0.0.1:server.port
        assert server.accepted[0].key == "<the-message-id>"
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from enum import Enum

from tests.harness.bad import BadServer, Gate, Gone, Moment, Plan, Received, drip, half, peer_of, until_gone

_MESSAGE_ID = re.compile(rb"^Message-ID:[ \r\n\t]*(\S+)", re.IGNORECASE | re.MULTILINE)


class Stage(Enum):
    """What the client waits for an answer to."""

    CONNECT = "connect"
    EHLO = "EHLO"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    BODY = "end of data"
    RSET = "RSET"


class Act(Enum):
    """What the server does instead."""

    STALL = "says nothing"
    LATER = "refuses for now"
    NEVER = "refuses for good"
    CLOSING = "says 421 and closes"
    CUT = "cuts its answer in the middle"
    DRIP = "sends a byte a second"
    DROP = "closes without an answer"
    LEAVE = "answers and closes"


_REFUSALS = {
    Act.LATER: b"451 4.7.1 come back later\r\n",
    Act.NEVER: b"550 5.1.1 not here\r\n",
    Act.CLOSING: b"421 4.3.2 going down\r\n",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens at a stage. At the end of the data the mail may have been `accepted` before."""

    stage: Stage
    act: Act
    accepted: bool = False

    def __str__(self) -> str:
        return f"SMTP {self.stage.value}: {'accepts, then ' if self.accepted else ''}{self.act.value}"


_EARLY = (Stage.CONNECT, Stage.EHLO)
_OF_A_MAIL = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.BODY)
_NOT_LEFT = tuple(act for act in Act if act is not Act.LEAVE)
OF_CONNECTIONS = tuple(Trouble(stage, act) for stage in _EARLY for act in _NOT_LEFT)
OF_MAILS = (
    *(Trouble(stage, act) for stage in _OF_A_MAIL for act in _NOT_LEFT),
    # Nobody says RSET but after a refusal, so the recipient is refused for good.
    *(Trouble(Stage.RSET, act) for act in (Act.STALL, Act.DROP)),
    # What is refused is not accepted, and the other way round.
    *(Trouble(Stage.BODY, act, accepted=True) for act in (Act.STALL, Act.CUT, Act.DRIP, Act.DROP, Act.LEAVE)),
)


class BadSmtp(BadServer):
    """Keeps what it accepts by its Message-ID; the target is the recipient."""

    def __init__(
        self,
        name: str,
        connections: Plan[Trouble] | None = None,
        mails: Plan[Trouble] | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(name, gate)
        self.greetings = connections or Plan()
        self.mails = mails or Plan()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _Session(self, reader, writer).run()

    async def take(self, session: _Session, content: bytes) -> None:
        """The end of a mail."""
        found = _MESSAGE_ID.search(content)
        received = self._note(found[1].decode() if found else "", session.recipient, content, session.writer)
        trouble = session.trouble
        if trouble is None or trouble.accepted:
            await self._keep(received)
        if trouble is None:
            await self.gate.passes(Moment.ACCEPTED, received.peer)
        await session.answer(Stage.BODY, b"250 2.0.0 taken\r\n", received)


class _Session:
    """One connection."""

    def __init__(self, server: BadSmtp, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.recipient = ""
        self.trouble = server.greetings.next()
        self._peer = peer_of(writer)
        self._reader = reader
        self._server = server

    async def run(self) -> None:
        await self.answer(Stage.CONNECT, b"220 bad.example ESMTP\r\n")
        while line := await self._reader.readline():
            verb, argument = line[:4].upper(), line.decode(errors="replace")
            if verb in (b"EHLO", b"HELO"):
                await self.answer(Stage.EHLO, b"250-bad.example\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n")
            elif verb == b"MAIL":
                self.trouble = self._server.mails.next()
                self._server.working.add(self._peer)
                if self.trouble is None:
                    await self._server.gate.passes(Moment.BEGUN, self._peer)
                await self.answer(Stage.MAIL, b"250 2.1.0 ok\r\n")
            elif verb == b"RCPT":
                self.recipient = argument.partition("<")[2].rpartition(">")[0]
                await self.answer(Stage.RCPT, b"250 2.1.5 ok\r\n")
            elif verb == b"DATA":
                if await self.answer(Stage.DATA, b"354 go ahead\r\n"):
                    content = await self._reader.readuntil(b"\r\n.\r\n")
                    await self._server.take(self, content[:-3].replace(b"\r\n..", b"\r\n."))
                    self._server.working.discard(self._peer)
            elif verb == b"QUIT":
                await self._say(b"221 2.0.0 bye\r\n")
                return
            elif verb == b"RSET":
                self._server.working.discard(self._peer)
                await self.answer(Stage.RSET, b"250 2.0.0 ok\r\n")
            else:
                await self._say(b"502 5.5.1 not here\r\n")

    async def answer(self, stage: Stage, text: bytes, received: Received | None = None) -> bool:
        """Answers, unless there is trouble. Whether it has said `text`; raises Gone where the connection is over."""
        trouble = self.trouble
        if stage is Stage.RCPT and trouble is not None and trouble.stage is Stage.RSET:
            await self._say(_REFUSALS[Act.NEVER])
            return False
        if trouble is None or trouble.stage is not stage:
            await self._say(text)
            if received is not None:
                received.answer_time = time.time()
            return True
        plan = self._server.greetings if stage in _EARLY else self._server.mails
        plan.met[trouble] += 1
        if trouble.act is Act.STALL:
            await until_gone(self._reader)
        elif trouble.act is Act.CUT:
            await half(self.writer, text)
        elif trouble.act is Act.DRIP:
            await drip(self._reader, self.writer, text)
        elif trouble.act is Act.LEAVE:
            await self._say(text)
        elif trouble.act in _REFUSALS:
            await self._say(_REFUSALS[trouble.act])
        if received is not None and trouble.act in (Act.DRIP, Act.LEAVE):
            received.answer_time = time.time()
        if trouble.act in (Act.DROP, Act.LEAVE, Act.CLOSING) or (trouble.act in _REFUSALS and stage is Stage.CONNECT):
            raise Gone
        return trouble.act is Act.DRIP

    async def _say(self, text: bytes) -> None:
        self.writer.write(text)
        await self.writer.drain()
