"""The fault switches: what each breaks, and how."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tests.faultrun.switches import Switch, once_in, put, switch
from user_service import errors, events, reads, snapshot, store, tokens
from user_service.events import Entry
from user_service.watch import Streams
from user_service.watch_request import WatchRequest
from user_service.window import Window
from user_service.writer import Writer

SWITCHES: dict[str, Switch] = {}
_switch = partial(switch, SWITCHES)


# What is in a message


def _break_messages(spoil: Callable[[list[bytes], int], None]) -> None:
    """One message in 50 is spoilt at a random place."""
    join = events.join

    def broken(entries: Sequence[Entry], include_previous: bool) -> list[bytes]:
        elements = join(entries, include_previous)
        if len(elements) > 1 and once_in(50):
            spoil(elements, random.randrange(len(elements) - 1))
        return elements

    put(events, "join", broken)


@_switch("Ordered", "swaps two events of a message")
def _swaps() -> None:
    def spoil(elements: list[bytes], at: int) -> None:
        elements[at : at + 2] = elements[at + 1], elements[at]

    _break_messages(spoil)


@_switch("Complete", "leaves an event out of a message")
def _drops() -> None:
    def spoil(elements: list[bytes], at: int) -> None:
        del elements[at]

    _break_messages(spoil)


@_switch("Unique", "sends an event twice")
def _repeats() -> None:
    def spoil(elements: list[bytes], at: int) -> None:
        elements.insert(at, elements[at])

    _break_messages(spoil)


@_switch("Atomic", "offers a token inside a group")
def _splits() -> None:
    after, read = Window.after, reads.page

    def ends(entries: list[Entry]) -> list[Entry]:
        return [entry._replace(group_end=True) for entry in entries]

    def broken_after(self: Window, position: int, limit: int) -> list[Entry]:
        entries = after(self, position, limit)
        return ends(entries) if once_in(10) else entries

    async def broken_read(*arguments: Any) -> reads.Page | None:
        page = await read(*arguments)
        if page is None or not once_in(10):
            return page
        return replace(page, group_end=True, entries=lambda: ends(page.entries()))

    put(Window, "after", broken_after)
    put(reads, "page", broken_read)


@_switch("Atomic", "sends messages of more than 1 MiB")
def _bulky() -> None:
    put(events, "LARGEST_MESSAGE", 8 << 20)


# What is told, and when


@_switch("Honest", "tells events before COMMIT, which may still fail")
def _hasty() -> None:
    transact, commit = Writer._transact, store.commit
    writing: list[Writer] = []

    async def noted(self: Writer, *arguments: Any) -> None:
        writing[:] = [self]
        await transact(self, *arguments)

    async def broken(connection: Any, locked: Any, changes: Any, entries: list[Entry], kept: Any) -> None:
        writing[0]._committed(entries)
        await commit(connection, locked, changes, entries, kept)

    put(Writer, "_transact", noted)
    put(store, "commit", broken)


@_switch("Honest", "takes a COMMIT whose answer was lost for done")
def _believes() -> None:
    async def broken(self: Writer, *arguments: Any) -> bool:
        return True

    put(Writer, "_is_committed", broken)


@_switch("Honest", "acknowledges changes that it has rolled back")
def _forgets() -> None:
    commit = store.commit

    async def broken(connection: Any, *arguments: Any) -> None:
        if once_in(100):
            await store.roll_back(connection)
        else:
            await commit(connection, *arguments)

    put(store, "commit", broken)


# Where a stream begins


@_switch("Resumable", "resumes one position too far")
def _leaps() -> None:
    start = Streams._start

    async def broken(self: Streams, request: WatchRequest) -> Any:
        begun = await start(self, request)
        token = begun.token
        if isinstance(request.start, tokens.ResumeToken) and token.position < begun.head and once_in(5):
            return replace(begun, token=replace(token, position=token.position + 1))
        return begun

    put(Streams, "_start", broken)


@_switch("Resumable", "accepts tokens of other logs")
def _trusts() -> None:
    resume = Streams._resume

    async def broken(self: Streams, token: tokens.ResumeToken, *arguments: Any) -> Any:
        seen = await self._event_hash(token.position)
        return await resume(self, replace(token, log_id=self._log_id, event_hash=seen), *arguments)

    put(Streams, "_resume", broken)


@_switch("Resumable", "refuses good tokens")
def _refuses() -> None:
    resume = Streams._resume

    async def broken(self: Streams, token: tokens.ResumeToken, *arguments: Any) -> Any:
        if once_in(20):
            raise errors.diverged_token(token.position)
        return await resume(self, token, *arguments)

    put(Streams, "_resume", broken)


# What else a stream is told


def _break_streams(broken: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]) -> None:
    stream = Streams.stream

    def wrapped(self: Streams, request: WatchRequest, caller: str) -> AsyncIterator[bytes]:
        return broken(stream(self, request, caller))

    put(Streams, "stream", wrapped)


@_switch("Bookmarked", "begins a stream without a bookmark")
def _mute() -> None:
    async def broken(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        skipping = once_in(10)
        async for message in messages:
            if not skipping:
                yield message
            skipping = False

    _break_streams(broken)


@_switch("Bookmarked", "offers no token while nothing happens")
def _silent() -> None:
    stream = Streams.stream

    def broken(self: Streams, request: WatchRequest, caller: str) -> AsyncIterator[bytes]:
        return stream(self, replace(request, bookmark_interval=300.0), caller)

    put(Streams, "stream", broken)


@_switch("Fair", "keeps everything for a stream that does not read")
def _hoards() -> None:
    async def broken(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def fill() -> None:
            try:
                async for message in messages:
                    # Whoever keeps messages apart shares no bytes.
                    queue.put_nowait(bytes(bytearray(message)))
            finally:
                queue.put_nowait(None)

        filling = asyncio.create_task(fill())
        try:
            while (message := await queue.get()) is not None:
                yield message
            await filling
        finally:
            filling.cancel()

    _break_streams(broken)


@_switch("Fair", "lets all streams wait for one that does not read")
def _waits() -> None:
    turn: asyncio.Lock | None = None

    async def broken(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        nonlocal turn
        turn = turn or asyncio.Lock()
        async for message in messages:
            async with turn:
                yield message

    _break_streams(broken)


@_switch("Snapshot", "leaves a user out of a snapshot")
def _overlooks() -> None:
    read = snapshot._read

    async def broken(*arguments: Any) -> Any:
        rows, last, is_end = await read(*arguments)
        if rows and once_in(10):
            del rows[random.randrange(len(rows))]
        return rows, last, is_end

    put(snapshot, "_read", broken)
