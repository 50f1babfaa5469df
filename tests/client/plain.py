"""Programs with plain threads that use `tidings.client.sync`: `python -m tests.client.plain NAME ADDRESS [ADDRESS]`,
the user service's and, for some, the notification service's.

Each has a process of its own, for the client's event loop and that of the tests would disturb each other in gRPC. A
program that ends with an AssertionError, or not at all, has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tidings.client import ApiError, BadTokenError, Batch, MemoryCursor, TidingsError, User, sync
from tidings.notifications.v1.endpoints_pb2 import Endpoint
from tidings.notifications.v1.in_app_pb2 import UpdateInAppNotificationsRequest
from tidings.notifications.v1.preferences_pb2 import Preferences
from tidings.notifications.v1.sends_pb2 import Send

_names = (f"u-{uuid.uuid4().hex[:12]}" for _ in itertools.count())


def create(channel: sync.Channel, count: int) -> list[str]:
    """Creates users, one after another; their names."""
    users, names = sync.Users(channel), [next(_names) for _ in range(count)]
    for name in names:
        users.create(User(username=name, email=f"{name}@example.com"))
    return names


def names_of(batch: Batch) -> list[str]:
    """The names in the events of a batch."""
    return [event.user.username for event in batch.events]


def take(batches: Iterator[Batch], count: int) -> list[str]:
    """The names in the next so many events."""
    names: list[str] = []
    while len(names) < count:
        names += names_of(next(batches))
    return names


def started(*targets: Callable[[], None]) -> list[threading.Thread]:
    """Threads that run."""
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def leaves_nothing(channel: sync.Channel) -> bool:
    """Whether soon nothing but what asks this runs in the client's loop, and no thread that a process waits for."""

    async def others() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    deadline = time.monotonic() + 10
    while channel.run(others()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    threads = threading.enumerate()
    loops = [thread for thread in threads if thread.name == "tidings-client"]
    return len(loops) == 1 and [thread.name for thread in threads if not thread.daemon] == ["MainThread"]


class ThreadBound:
    """A blocking store that keeps to one thread, as a database connection does."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.saves = 0
        self._thread = threading.get_ident()

    def load(self) -> str | None:
        """The token."""
        assert threading.get_ident() == self._thread
        return self.token

    def save(self, token: str) -> None:
        """Keeps a token."""
        assert threading.get_ident() == self._thread
        self.token, self.saves = token, self.saves + 1


def iterates(address: str) -> None:
    """From the cursor's place, with stores of both kinds; what was not processed comes again."""
    with sync.connect(address) as channel:
        stores: list[ThreadBound | MemoryCursor] = [ThreadBound(), MemoryCursor()]
        for store in stores:
            store.token = _now(channel)
            names = create(channel, 5)
            feed = sync.UserFeed(channel, cursor=store, max_batch=2)
            assert take(iter(feed), 3)[:3] == names[:3]
            # The first batch was processed, for another one was asked for.
            again = sync.UserFeed(channel, cursor=store, max_batch=1)
            assert take(iter(again), 3) == names[2:5]
            assert leaves_nothing(channel)
        assert isinstance(stores[0], ThreadBound)
        assert stores[0].saves >= 3
        users = sync.Users(channel)
        for user in users.list(username_prefix=names[0], page_size=1):
            assert users.get(user.id) == user
            assert user.username == names[0]
    assert channel.is_closed


def _now(channel: sync.Channel) -> str:
    return next(iter(sync.UserFeed(channel, start="now", progress=True))).resume_token


def closed_by_another_thread(address: str) -> None:
    """A reader that waits ends its loop; one that works ends it at the next batch; whoever comes later is refused."""
    with sync.connect(address) as other:
        for _ in range(20):
            _close_under_readers(sync.connect(address))
        assert leaves_nothing(other)


def _close_under_readers(channel: sync.Channel) -> None:
    ended: list[str] = []
    arrived, closed = threading.Barrier(3), threading.Event()

    def waits() -> None:
        for batch in sync.UserFeed(channel, start="now", progress=True):
            if batch.caught_up:
                arrived.wait()
        ended.append("waits")

    def works() -> None:
        for _ in sync.UserFeed(channel, start="now", progress=True):
            arrived.wait()
            closed.wait()
        ended.append("works")

    threads = started(waits, works)
    arrived.wait()
    channel.close()
    closed.set()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["waits", "works"]
    channel.close()
    assert list(sync.UserFeed(channel)) == []
    try:
        sync.Users(channel).feed()
    except TidingsError as error:
        assert str(error) == "the channel is closed"  # noqa: PT017
    else:
        raise AssertionError


def closed_among_calls(address: str) -> None:
    """Calls of other threads have their answer or a TidingsError, whenever the channel is closed."""
    for number in range(30):
        _close_under_calls(sync.connect(address), number * 0.002)
    with sync.connect(address) as channel:
        assert leaves_nothing(channel)


def _close_under_calls(channel: sync.Channel, after: float) -> None:
    ended: list[str] = []

    def calls() -> None:
        with contextlib.suppress(TidingsError):
            while True:
                sync.Users(channel).feed()
        ended.append("calls")

    def follows() -> None:
        while not channel.is_closed:
            for _ in sync.UserFeed(channel, start="now", progress=True):
                break
        ended.append("follows")

    threads = started(calls, calls, follows)
    time.sleep(after)
    channel.close()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["calls", "calls", "follows"]


class Refusing(ThreadBound):
    """Cannot save."""

    def save(self, token: str) -> None:
        """Fails."""
        raise OSError(28, "No space left on device")


def raises(address: str) -> None:
    """What the reader, the store, the feed and a call raise arrives in the thread that waits, and ends the stream."""
    with sync.connect(address) as channel:
        cursor = MemoryCursor(_now(channel))
        names = create(channel, 2)
        feed = sync.UserFeed(channel, cursor=cursor, max_batch=1)
        for _ in range(2):
            try:
                for batch in feed:
                    assert names_of(batch) == names[:1]
                    raise LookupError("of the reader")
            except LookupError:
                assert leaves_nothing(channel)
        for store, expected in ((Refusing(), OSError), (MemoryCursor("nonsense"), BadTokenError)):
            try:
                for _ in sync.UserFeed(channel, cursor=store):
                    pass
            except expected:
                assert leaves_nothing(channel)
            else:
                raise AssertionError
        try:
            sync.Users(channel).get(str(uuid.uuid4()))
        except ApiError as error:
            assert error.reason == "USER_NOT_FOUND"  # noqa: PT017


def interrupted(address: str) -> None:
    """Ctrl-C comes again and again while users are created: nothing is missing, and only what was not processed comes
    again.
    """
    # One that comes while the garbage of an earlier one is collected.
    sys.unraisablehook = lambda one: None if one.exc_type is KeyboardInterrupt else sys.__unraisablehook__(one)
    # One that comes just after a coroutine was made.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    with sync.connect(address) as channel:
        feed, names = sync.UserFeed(channel, cursor=MemoryCursor(_now(channel))), [next(_names) for _ in range(150)]
        over = threading.Event()

        def interrupt() -> None:
            while not over.wait(random.uniform(0, 0.03)):
                os.kill(os.getpid(), signal.SIGINT)

        def write() -> None:
            for name in names:
                sync.Users(channel).create(User(username=name, email=f"{name}@example.com"))

        seen: list[str] = []
        begun = position = None
        threads = started(write, interrupt)
        interruptions = 0
        while len(seen) < len(names):
            try:
                for batch in feed:
                    # A batch that was not processed comes again, perhaps with what has come since.
                    assert position is None or batch.previous_position in (begun, position)
                    unseen = [event.user.username for event in batch.events if event.position > (position or 0)]
                    # An interruption cannot come between these.
                    begun, position, seen = batch.previous_position, batch.position, seen + unseen
                    if len(seen) >= len(names):
                        break
            except KeyboardInterrupt:
                interruptions += 1
        while True:
            try:
                over.set()
                for thread in threads:
                    thread.join()
                break
            except KeyboardInterrupt:
                pass
        assert seen == names
        assert interruptions > 3
        assert leaves_nothing(channel)


def several(address: str) -> None:
    """Feeds of several threads over one channel and over others see everything, each in its own order."""
    with sync.connect(address) as channel, sync.connect(address) as second:
        token = _now(channel)
        seen: dict[int, list[str]] = {}

        def follow(number: int) -> None:
            store = ThreadBound()
            store.token = token
            feed = sync.UserFeed((channel, second)[number % 2], cursor=store, max_batch=number + 1)
            seen[number] = take(iter(feed), 40)

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        names = create(channel, 40)
        for thread in threads:
            thread.join()
        assert all(seen[number] == names for number in range(8))
        assert leaves_nothing(channel)


def collected_in_the_loop(address: str) -> None:
    """An iteration that the garbage collector ends in the loop's own thread does not stop the loop."""

    async def collect() -> None:
        gc.collect()

    async def blocks(channel: sync.Channel) -> str:
        try:
            sync.Users(channel).feed()
        except RuntimeError as error:
            return str(error)
        return ""

    with sync.connect(address) as channel:
        gc.disable()
        batches = iter(sync.UserFeed(channel, start="now", progress=True))
        next(batches)
        cycle: list[object] = [batches]
        cycle.append(cycle)
        del batches, cycle
        channel.run(collect())
        gc.enable()
        assert leaves_nothing(channel)
        assert "would wait for itself" in channel.run(blocks(channel))


def left_open(address: str) -> None:
    """The process ends although a feed and its channel are open."""
    channel = sync.connect(address)
    batches = iter(sync.UserFeed(channel, start="now", progress=True))
    next(batches)
    globals()["_left"] = (channel, batches)


def notified(address: str, notifications: str) -> None:
    """What becomes of a change is read, changed and followed with every client of the notification service."""
    with sync.connect(address) as channel:
        name = next(_names)
        user = sync.Users(channel).create(User(username=name, email=f"{name}@example.com"))
    with sync.connect(notifications) as channel:
        cursor = ThreadBound()
        feed = iter(sync.NotificationFeed(channel, cursor=cursor, user_id=user.id))
        [welcome] = next(feed).events
        feed.close()
        inbox, said = sync.InApp(channel, user.id), sync.Notifications(channel)
        assert inbox.change(UpdateInAppNotificationsRequest.READ, [welcome.id]).counts.unread == 0
        counts = iter(inbox.watch(cursor=MemoryCursor(), start="earliest"))
        assert next(counts).in_app_counts == inbox.counts()
        counts.close()
        assert [one.id for one in inbox.list()] == [one.id for one in said.list(user_id=user.id)] == [welcome.id]
        assert {one.notification_id for one in said.deliveries(user_id=user.id)} == {welcome.id}
        assert said.explain(notification_id=welcome.id)
        assert said.inbox().log_id

        preferences = sync.Preferences(channel)
        preferences.suppress(user.email)
        assert [one.target for one in preferences.suppressions(target=user.email)] == [user.email]
        assert preferences.suppression(user.email) == preferences.unsuppress(user.email)
        assert preferences.update(Preferences(user_id=user.id, channels={"email": False}), ["channels"]).version == 1
        assert "welcome" in [one.name for one in sync.Templates(channel).list()]
        asked = Send(template="announcement", category="news", channels=["in_app"])
        asked.params.update({"subject": "Rain", "text": "Today."})
        asked.recipients.user_ids.ids.append(user.id)
        sent = sync.Sends(channel).create(asked)
        assert [one.state for one in sync.Sends(channel).watch(sent.id, every=0.05)][-1] == Send.SENT
        endpoints = sync.WebhookEndpoints(channel)
        endpoint, _ = endpoints.create(Endpoint(name=name, url="https://hooks.example.com/"))
        assert endpoints.disable(endpoint.id).state == Endpoint.DISABLED
        assert list(sync.Digests(channel).list(user_id=user.id)) == []
        assert leaves_nothing(channel)


PROGRAMS: dict[str, Callable[[str], None]] = {
    program.__name__: program
    for program in (
        iterates, closed_by_another_thread, closed_among_calls, raises, interrupted, several, collected_in_the_loop,
        left_open,
    )
}  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1] == "notified":
        notified(*sys.argv[2:])
    else:
        PROGRAMS[sys.argv[1]](sys.argv[2])
    print("done")
