"""The sender: makes the notifications of sends that are due, page after page of their recipients.

Sends take turns, one page each, among all replicas. A page is composed outside of any transaction and stored in one
with the send's progress; what that leaves of a page is made again by whoever has the next turn, and as the ids are
derived it is the same. A page ends early if composing it takes long, so that it is stored before the turn is over.

The same loop sees to cancelled sends: what was on its way when one was cancelled is looked at again until it is
delivered, given up, or cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from notification_service import metrics, sent
from notification_service.compose import Composer
from notification_service.domain import Notification, Order, Person
from notification_service.store import audience, recipients, sends, settling
from notification_service.store.sends import DeletedMeanwhileError, Page, TurnLostError
from notification_service.templates import Loaded, RenderError
from servicekit import database, logs, tasks
from servicekit.database import Connection, Pool

log = logs.get(__name__)

_T = TypeVar("_T")

# Recipients of a page, and how many are composed at a time: at first the fewest, then twice as many each time up to the
# most. So a template that takes long is noticed early, and what comes next takes about as long as all before it. Where
# it took longer, and the turn was lost over it, it is the fewest each time.
_PAGE = 200
_FEWEST, _MOST = 8, 64
# What part of a turn composing may take before the page is stored as far as it is.
_SHARE_OF_TURN = 0.25
_LONGEST_PAUSE = 2.0
_MOST_REMEMBERED = 1000
# Windows of a cancelled send that a call looks at itself.
_SETTLED_BY_CALL = 20


@dataclass(frozen=True, slots=True)
class _Found:
    """Recipients of a page, which is past everybody up to `upto`."""

    people: Sequence[Person]
    upto: uuid.UUID | None
    done: bool
    unknown: Sequence[uuid.UUID] = ()
    deleted: Sequence[uuid.UUID] = ()


class Sender:
    """`run` is a loop for the caller's supervisor. `stored` is called when there are new deliveries; `turn` is how long
    a page may take before another replica makes it, in seconds.
    """

    def __init__(
        self,
        pool: Pool,
        composer: Composer,
        stored: Callable[[], None],
        *,
        turn: float,
        poll_interval: float,
    ) -> None:
        self._pool = pool
        self._composer = composer
        self._stored = stored
        self._turn = turn
        self._poll_interval = poll_interval
        self._work = asyncio.Event()
        self._draining = False
        # Sends and the versions of templates that were tried out.
        self._tried: set[tuple[uuid.UUID, str]] = set()
        # Sends whose turn was lost while a page was made.
        self._lost: set[uuid.UUID] = set()

    def wake(self) -> None:
        """There may be something to do."""
        self._work.set()

    def drain(self) -> None:
        """Begins no further page."""
        self._draining = True

    async def run(self) -> None:
        """Makes notifications as long as there are sends that are due."""
        while True:
            tasks.beat()
            self._work.clear()
            order = None
            if not self._draining:
                order = await self._retried(lambda connection: sends.take(connection, self._turn))
            if order is not None:
                await self._expand(order)
            if await self._settle_one() or order is not None:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval):
                    await self._work.wait()

    async def _expand(self, order: Order) -> None:
        """Makes the next page of a send; stores it, or leaves it to the next turn."""
        templates = self._composer.templates.current
        try:
            failure = await self._problem(order, templates)
            if failure:
                log.warning("a send failed", send_id=str(order.id), reason=failure)
                async with self._pool.connection() as connection:
                    await sends.fail(connection, order, failure)
                return
            page = await self._made(order, templates)
        except TurnLostError:
            log.info("the turn of a send is over", send_id=str(order.id))
            if len(self._lost) >= _MOST_REMEMBERED:
                self._lost.clear()
            self._lost.add(order.id)
        except database.AWAY as error:
            # Whoever has the next turn makes the page.
            log.warning("sends: database not reachable", error=str(error).strip())
            await asyncio.sleep(min(_LONGEST_PAUSE, self._turn))
        else:
            metrics.expanded(**page.counts())
            if page.done:
                log.info("a send is made", send_id=str(order.id))
            if page.made:
                self._stored()

    async def _made(self, order: Order, templates: Loaded) -> Page:
        """The next page, composed and stored."""
        while True:
            async with self._pool.connection() as connection:
                found = await _read(connection, order)
            page = await self._composed(order, found, templates)
            async with self._pool.connection() as connection:
                try:
                    await sends.advance(connection, order, page)
                except DeletedMeanwhileError:
                    log.info("a recipient of a send was deleted meanwhile", send_id=str(order.id))
                    continue
            return page

    async def _problem(self, order: Order, templates: Loaded) -> str:
        """Why a send cannot be made with these templates, which may have changed since the call; empty if it can."""
        key = order.id, templates.version
        if key in self._tried:
            return ""
        if order.template not in templates.files.names():
            return f"UNKNOWN_TEMPLATE: there is no template {order.template} any more"
        try:
            await asyncio.to_thread(
                sent.try_out, order.template, order.channels, order.params, templates, self._composer.writers
            )
        except RenderError as error:
            return f"TEMPLATE_FAILED: {error}"
        if len(self._tried) >= _MOST_REMEMBERED:
            self._tried.clear()
        self._tried.add(key)
        return ""

    async def _composed(self, order: Order, found: _Found, templates: Loaded) -> Page:
        """The page of these recipients, or of as many of them as there is time for."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._turn * _SHARE_OF_TURN
        made: list[Notification] = []
        skipped: Counter[str] = Counter()
        upto, done, left = found.upto, found.done, found.people
        size, most = _FEWEST, _FEWEST if order.id in self._lost else _MOST
        while left:
            tasks.beat()
            some, left = left[:size], left[size:]
            composed, reasons = await asyncio.to_thread(sent.notifications, order, some, templates, self._composer)
            made += composed
            skipped.update(reasons)
            size = min(2 * size, most)
            if left and loop.time() > until:
                upto, done = some[-1].user_id, False
                break
        unknown, deleted = (
            [one for one in ids if upto is not None and one <= upto] for ids in (found.unknown, found.deleted)
        )
        skipped["deleted"] += len(deleted)
        return Page(made, upto, done, unknown, skipped)

    async def _settle_one(self) -> bool:
        """Looks at a cancelled send of which something may be pending; whether there was one."""
        identity = await self._retried(settling.unsettled)
        if identity is None:
            return False
        left, after = 0, 0
        while True:
            tasks.beat()
            upto, ended, pending = await self._retried(
                lambda connection, after=after: settling.settle(connection, identity, after)  # type: ignore[misc]
            )
            left += pending
            if ended:
                log.info("deliveries of a cancelled send are cancelled", send_id=str(identity), deliveries=ended)
            if upto is None:
                break
            after = upto
        if not left:
            await self._retried(lambda connection: settling.settled(connection, identity))
        return True

    async def _retried(self, action: Callable[[Connection], Awaitable[_T]]) -> _T:
        return await database.persist(self._pool, action, "sends: database not reachable")


async def settle_now(connection: Connection, identity: uuid.UUID) -> None:
    """Cancels what is pending of a cancelled send, for the call that cancels it; of a long one the sender does the
    rest.
    """
    after: int | None = 0
    for _ in range(_SETTLED_BY_CALL):
        after, _, _ = await settling.settle(connection, identity, after or 0)
        if after is None:
            return


async def _read(connection: Connection, order: Order) -> _Found:
    """The next recipients of a send."""
    if order.user_ids is None:
        page = await audience.page(connection, order.filter or {}, order.passed or recipients.NOBODY, _PAGE)
        return _Found(page.people, page.upto or recipients.EVERYBODY, page.upto is None)
    ids = sorted(one for one in order.user_ids if order.passed is None or one > order.passed)
    some = ids[:_PAGE]
    people, deleted = await audience.of_ids(connection, some)
    known = {one.user_id for one in people} | deleted
    unknown = [one for one in some if one not in known]
    return _Found(people, some[-1] if some else order.passed, len(some) == len(ids), unknown, sorted(deleted))
