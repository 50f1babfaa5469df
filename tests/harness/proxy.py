"""A proxy before Postgres that breaks connections at chosen instants.

It listens on a TCP port of 127.0.0.1, knows each connection by its application_name, understands what the client sends,
and does what a test has armed: cut a connection before the server gets a COMMIT, or after the server has done it and
before the client knows; hold either direction until it is released. It runs in the test's own event loop.

    async with PostgresProxy(postgres.server.socket_dir) as proxy:
        users = await services.users(proxy.url(database)).start()
        fault = proxy.arm("*writer*", Action.CUT_AFTER, is_commit)
        ...
        await fault.happened()
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tests.harness import wire
from tests.harness.postgres import Database
from tests.harness.process import until
from tests.harness.wire import Message

_CHUNK = 1 << 16


class Action(Enum):
    """What happens at the message that a fault waits for."""

    CUT_BEFORE = auto()
    """Both sides are closed; the server never gets the message."""
    CUT_AFTER = auto()
    """The server gets the message and answers; the answer is thrown away and both sides are closed."""
    HOLD_BEFORE = auto()
    """The message and all that the client sends after it waits here until `release`."""
    HOLD_AFTER = auto()
    """The server gets the message; its answer and all after it waits here until `release`."""


def is_commit(message: Message) -> bool:
    """Runs a COMMIT, prepared or not."""
    runs = message.type in (wire.BIND, wire.QUERY)
    return runs and message.sql is not None and message.sql.strip().rstrip(";").upper() == "COMMIT"


def sql_contains(text: str) -> Callable[[Message], bool]:
    """Runs a statement that contains `text`."""

    def matches(message: Message) -> bool:
        return message.type in (wire.BIND, wire.QUERY) and message.sql is not None and text in message.sql

    return matches


def anything(_: Message) -> bool:
    """Every message."""
    return True


@dataclass(eq=False, slots=True)
class Fault:
    """An armed fault. `hits` counts how often it has happened; it disarms itself after `times`."""

    application: str
    action: Action
    when: Callable[[Message], bool]
    times: int
    hits: int = 0
    caught: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def matches(self, application: str, message: Message) -> bool:
        """Whether it strikes at this message."""
        return self.caught < self.times and fnmatchcase(application, self.application) and self.when(message)

    def release(self) -> None:
        """Lets go of everything that is held."""
        self.released.set()

    def disarm(self) -> None:
        """It strikes no more; what is held stays held until `release`."""
        self.times = self.caught

    async def happened(self, count: int = 1, timeout: float = 15.0) -> None:
        """Waits until it has happened `count` times: the connection is cut, or the direction held."""
        await until(lambda: self.hits >= count, timeout, f"{self.action.name} of {self.application} {count} times")


class _Connection:
    """One client, its server connection, and what is going on between them."""

    def __init__(self, proxy: PostgresProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = reader, writer
        self.application = ""
        self._writers = [writer]
        # Answers (ReadyForQuery) that the server owes and that it has given; the start-up is owed one.
        self._owed = 1
        self._given = 0
        # The fault whose answer is awaited, and which answer that is.
        self._awaited: tuple[Fault, int] | None = None

    def abort(self) -> None:
        """Closes both sides at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def run(self) -> None:
        try:
            startup = await self._startup()
            if startup is None or self._proxy.refusing:
                return
            server_reader, server_writer = await asyncio.open_unix_connection(str(self._proxy.upstream))
            self._writers.append(server_writer)
            server_writer.write(startup)
            self._proxy.opened[self.application] += 1
            self._proxy.connections.add(self)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._forward(self._client[0], server_writer))
                tasks.create_task(self._backward(server_reader, self._client[1]))
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._proxy.connections.discard(self)
            self.abort()

    async def _startup(self) -> bytes | None:
        """The client's start-up message; encryption is declined, a cancellation is passed on."""
        reader, writer = self._client
        while True:
            length, code = struct.unpack("!II", head := await reader.readexactly(8))
            if code in (wire.SSL_REQUEST, wire.GSS_REQUEST):
                writer.write(b"N")
                continue
            body = await reader.readexactly(length - 8)
            if code == wire.CANCEL_REQUEST:
                _, server = await asyncio.open_unix_connection(str(self._proxy.upstream))
                server.write(head + body)
                await server.drain()
                server.close()
                return None
            self.application = wire.parameters(body).get("application_name", "")
            return head + body

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frontend = wire.Frontend()
        while data := await reader.read(_CHUNK):
            ready = b""
            for message in frontend.feed(data):
                fault = self._proxy.strike(self.application, message)
                if fault is not None and fault.action in (Action.CUT_BEFORE, Action.HOLD_BEFORE):
                    # What came before it has been sent on its own and would have arrived.
                    writer.write(ready)
                    await writer.drain()
                    ready = b""
                    fault.hits += 1
                    if fault.action is Action.CUT_BEFORE:
                        raise ConnectionAbortedError
                    await fault.released.wait()
                elif fault is not None:
                    self._awaited = fault, self._owed + 1
                self._owed += message.type in wire.ANSWERED
                ready += message.raw
            writer.write(ready)
            await writer.drain()
        raise ConnectionResetError("the client went away")

    async def _backward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        splitter = wire.Splitter()
        while data := await reader.read(_CHUNK):
            ready = b""
            for kind, payload in splitter.feed(data):
                awaited = self._awaited
                if awaited is not None and self._given + 1 >= awaited[1]:
                    fault = awaited[0]
                    if fault.action is Action.CUT_AFTER:
                        if kind == wire.READY_FOR_QUERY:
                            fault.hits += 1
                            raise ConnectionAbortedError
                        continue
                    writer.write(ready)
                    ready = b""
                    fault.hits += 1
                    await fault.released.wait()
                    self._awaited = None
                self._given += kind == wire.READY_FOR_QUERY
                ready += Message(kind, payload).raw
            writer.write(ready)
            await writer.drain()
        raise ConnectionResetError("the server went away")


class PostgresProxy:
    """Listens while it is open. While `refusing` is set, new connections are closed at once."""

    def __init__(self, socket_dir: Path) -> None:
        self.upstream = socket_dir / ".s.PGSQL.5432"
        self.connections: set[_Connection] = set()
        self.opened: Counter[str] = Counter()
        self.refusing = False
        self._faults: list[Fault] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> PostgresProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def url(self, database: Database | str) -> str:
        """The URL of a database by way of the proxy."""
        parts = urlsplit(database.url if isinstance(database, Database) else database)
        return f"postgresql://{parts.username}@127.0.0.1:{self.port}{parts.path}"

    def arm(
        self, application: str, action: Action, when: Callable[[Message], bool] = anything, *, times: int = 1
    ) -> Fault:
        """Waits for a message that `when` accepts, of connections whose application_name matches the pattern."""
        fault = Fault(application, action, when, times)
        self._faults.append(fault)
        return fault

    def cut(self, application: str = "*") -> int:
        """Closes the matching connections now; returns how many."""
        matching = [open_ for open_ in self.connections if fnmatchcase(open_.application, application)]
        for connection in matching:
            connection.abort()
        return len(matching)

    def active(self, application: str = "*") -> int:
        """How many matching connections are open."""
        return sum(fnmatchcase(open_.application, application) for open_ in self.connections)

    def strike(self, application: str, message: Message) -> Fault | None:
        """The armed fault that this message sets off."""
        for fault in self._faults:
            if fault.matches(application, message):
                fault.caught += 1
                return fault
        return None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await _Connection(self, reader, writer).run()
        self._tasks.discard(task)
