"""A real Postgres, a real mail server and events to feed the service with."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from uuid_utils.compat import uuid7

from notification_service import categories, lanes, rules
from notification_service.api.explanations import Explainer
from notification_service.compose import Composer
from notification_service.dispatcher import Dispatcher, Lane
from notification_service.templates import Templates
from servicekit import database
from servicekit.database import Connection, Pool
from tests.harness import Database
from tidings.client import Batch
from tidings.users.v1 import users_pb2

if TYPE_CHECKING:
    from tests.notifications.digesting import Site

SENDER = "Tidings <no-reply@tidings.localhost>"
TRACE_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def url(notifications_database: Database) -> str:
    """The DSN of a fresh database."""
    return notifications_database.url


@pytest.fixture
async def pool(url: str) -> AsyncIterator[Pool]:
    async with database.pool(url, "tests", size=6) as opened:
        yield opened


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Connection]:
    async with await database.connect(url, "tests") as opened:
        yield opened


@pytest.fixture(scope="session")
def composer() -> Composer:
    """The built-in rules and templates, without webhooks."""
    return Composer(rules.load(None), Templates(), lanes.writers(SENDER, ()))


def explainer(pool: Pool) -> Explainer:
    """What explains deliveries where no user service can be asked."""
    users = grpc.aio.insecure_channel("127.0.0.1:1")
    return Explainer(pool, users, rules.load(None), categories.load(None), lambda channel, target: "", tuple)


@pytest.fixture(scope="session")
def digesting(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    """Rules with digests of an hour, of three items at most."""
    # It uses what this module has.
    from tests.notifications.digesting import compose_of

    return compose_of(tmp_path_factory.mktemp("digests"))


@pytest.fixture
async def site(digesting: Composer, pool: Pool, connection: Connection) -> Site:
    """An inbox with these rules, and one who closes its digests."""
    from tests.notifications.digesting import Site

    return Site(digesting, pool, connection)


@asynccontextmanager
async def dispatching(
    pool: Pool, lanes: Mapping[str, Lane], *, lease: float = 30.0, poll_interval: float = 0.05
) -> AsyncIterator[Dispatcher]:
    """A dispatcher at work, whose loops must not end by themselves."""
    dispatcher = Dispatcher(pool, lanes, categories.load(None), lease=lease, poll_interval=poll_interval)
    loops = [*map(dispatcher.run_lane, lanes), dispatcher.record(), dispatcher.tidy()]
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield dispatcher
    finally:
        await dispatcher.drain(1.0)
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not ended


@dataclass(frozen=True, slots=True)
class Received:
    sender: str
    recipient: str
    raw: bytes
    session: int

    @property
    def message(self) -> EmailMessage:
        parsed = message_from_bytes(self.raw, policy=policy.default)
        assert isinstance(parsed, EmailMessage)
        return parsed


@dataclass
class MailServer:
    """A mail server's handler: keeps what it accepts, answers to a recipient what a test told it to."""

    received: list[Received] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    sessions: set[int] = field(default_factory=set)
    most_per_session: int = 0
    delay: float = 0.0
    port: int = 0

    def _answer(self, command: str) -> str:
        planned = self.answers.get(command, [])
        return planned.pop(0) if planned else ""

    async def handle_MAIL(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        self.sessions.add(id(session))
        done = sum(one.session == id(session) for one in self.received)
        if self.most_per_session and done >= self.most_per_session:
            return "421 4.7.0 enough of this connection"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        envelope.rcpt_tos.append(address)
        return self._answer(address) or "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        await asyncio.sleep(self.delay)
        answer = self._answer("DATA")
        if answer and not answer.startswith("250"):
            return answer
        content = envelope.content
        assert isinstance(content, bytes)
        self.received.append(Received(str(envelope.mail_from), envelope.rcpt_tos[0], content, id(session)))
        return answer or "250 OK"


def _serve_mail(**options: Any) -> Iterator[MailServer]:
    handler = MailServer()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        handler.port = free.getsockname()[1]
    controller = Controller(handler, hostname="127.0.0.1", port=handler.port, **options)
    controller.start()
    yield handler
    controller.stop()


@pytest.fixture
def mail() -> Iterator[MailServer]:
    """A mail server that takes internationalized addresses."""
    yield from _serve_mail(enable_SMTPUTF8=True)


@pytest.fixture
def old_mail() -> Iterator[MailServer]:
    """A mail server that takes only ASCII addresses."""
    yield from _serve_mail(enable_SMTPUTF8=False)


class Events:
    """Makes events with positions 1, 2, 3 ..."""

    def __init__(self) -> None:
        self._positions = itertools.count(1)

    def _event(self, kind: str, user: users_pb2.User, **fields: Any) -> users_pb2.UserEvent:
        event = users_pb2.UserEvent(
            position=next(self._positions),
            id=str(uuid7()),
            type=users_pb2.UserEvent.Type.Value(kind),
            user=user,
            actor="",
            trace_parent=TRACE_PARENT,
            trace_state="vendor=1",
            **fields,
        )
        event.commit_time.FromDatetime(datetime.now(UTC))
        return event

    def user(self, username: str, **fields: Any) -> users_pb2.User:
        user = users_pb2.User(
            id=str(uuid7()), username=username, version=1, **{"email": f"{username}@example.com", **fields}
        )
        user.create_time.FromDatetime(datetime.now(UTC))
        return user

    def created(self, username: str, **fields: Any) -> users_pb2.UserEvent:
        return self._event("CREATED", self.user(username, **fields))

    def updated(self, before: users_pb2.User, **changes: Any) -> users_pb2.UserEvent:
        after = users_pb2.User()
        after.CopyFrom(before)
        after.MergeFrom(users_pb2.User(version=before.version + 1, **changes))
        return self._event("UPDATED", after, previous=before, changed_fields=sorted(changes))

    def deleted(self, before: users_pb2.User) -> users_pb2.UserEvent:
        return self._event("DELETED", before, previous=before)


@pytest.fixture
def events() -> Events:
    return Events()


def batch(*events: users_pb2.UserEvent, after: int | None = None, token: str | None = None) -> Batch:
    """A batch of the feed that holds these events."""
    previous = events[0].position - 1 if after is None else after
    position = events[-1].position if events else previous
    return Batch(
        events=tuple(events),
        resume_token=token or f"token-{position}",
        previous_position=previous,
        position=position,
        head_position=position,
        head_time=None,
        caught_up=False,
    )


async def eventually(condition: Any, timeout: float = 30.0) -> None:
    """Waits until a condition holds; it may be a coroutine function."""
    async with asyncio.timeout(timeout):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.01)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
