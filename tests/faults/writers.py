"""The writers, a process of its own: `python -m tests.faults.writers`.

Some callers, each of whom asks for one change after the other. What a caller asks for follows from the seed and from
what it was answered. A caller changes users of its own, and some that all share. Lines on standard input command:
`pause`, `go`, `stop`; each is answered by a line with how many changes were settled.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from tests.faults.asking import Asked, Asker
from tests.faults.journal import Journal
from tests.proof.records import Intent
from tidings.users.v1 import users_pb2

_TEAMS = ("red", "green", "blue")
_LARGE = {f"large-{n}": "v" * 250 for n in range(30)}  # 8 kB


class Commands:
    """What the run has commanded."""

    def __init__(self) -> None:
        self.going = asyncio.Event()
        self.going.set()
        self.stopped = False
        self.resting = 0
        self.changed = asyncio.Condition()

    async def turn(self) -> bool:
        """Waits while paused; whether to go on."""
        if not self.going.is_set() and not self.stopped:
            async with self.changed:
                self.resting += 1
                self.changed.notify_all()
            await self.going.wait()
            self.resting -= 1
        return not self.stopped


class Caller:
    """One caller."""

    def __init__(
        self, number: int, seed: int, asker: Asker, commands: Commands, shared: list[str], pause: float, large: float
    ):
        self._number = number
        self._chance = random.Random(f"{seed} caller {number}")
        self._asker = asker
        self._commands = commands
        self._shared = shared
        self._pause = pause
        self._count = 0
        # Own users as last answered.
        self._living: dict[str, users_pb2.User] = {}
        self._deleted: dict[str, users_pb2.User] = {}
        self._recent: deque[Asked] = deque(maxlen=20)
        self._deeds: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (30, self._create),
            (30, self._update),
            (10, self._update_shared),
            (8, self._delete),
            (7, self._undelete),
            (8, self._batch),
            (large, self._large_batch),
            (4, self._taken),
            (2, self._invalid),
            (3, self._stale),
            (2, self._validate),
            (3, self._batch_with_taken),
            (4, self._again),
        ]

    async def run(self) -> None:
        """Asks until told to stop."""
        weights, deeds = zip(*self._deeds, strict=True)
        await self._create()
        while await self._commands.turn():
            [deed] = self._chance.choices(deeds, weights)
            await deed()
            await asyncio.sleep(self._chance.expovariate(1 / self._pause))

    # Requests

    def _op(self) -> str:
        self._count += 1
        return f"{self._number}-{self._count}"

    def _request_id(self) -> str:
        return str(uuid.UUID(int=self._chance.getrandbits(128), version=4))

    def _user(self, tag: str, **fields: object) -> users_pb2.User:
        name = f"u{tag}"
        labels = {"team": self._chance.choice(_TEAMS)}
        given = {"username": name, "email": f"{name}@example.com", "display_name": tag, "labels": labels, **fields}
        return users_pb2.User(**given)

    def _create_request(self, tag: str, **fields: object) -> users_pb2.CreateUserRequest:
        return users_pb2.CreateUserRequest(user=self._user(tag, **fields), request_id=self._request_id())

    async def _settle(self, asked: Asked) -> list[users_pb2.User] | None:
        users = await self._asker.settle(asked, self._chance)
        if users is not None:
            self._recent.append(asked)
        return users

    def _own(self, users: list[users_pb2.User] | None) -> None:
        for user in users or ():
            living = not user.HasField("delete_time")
            (self._living if living else self._deleted)[user.id] = user
            (self._deleted if living else self._living).pop(user.id, None)

    # Deeds

    async def _create(self) -> None:
        op = self._op()
        intent = Intent(op, "CreateUser", time.monotonic(), [op], "")
        users = await self._settle(Asked(intent, self._create_request(op)))
        if users and self._chance.random() < 0.1:
            self._shared.append(users[0].id)
        else:
            self._own(users)

    def _update_request(self, op: str, user_id: str, version: int, *, names: bool) -> Asked:
        user = users_pb2.User(id=user_id, version=version, display_name=op)
        paths = ["display_name"]
        if self._chance.random() < 0.3:
            user.labels["team"] = self._chance.choice(_TEAMS)
            paths.append("labels")
        if names and self._chance.random() < 0.2:
            user.username, user.email = f"u{op}", f"u{op}@example.com"
            paths += ["username", "email"]
        request = users_pb2.UpdateUserRequest(user=user, update_mask={"paths": paths}, request_id=self._request_id())
        return Asked(Intent(op, "UpdateUser", time.monotonic(), [op], user_id), request)

    async def _update(self) -> None:
        if not self._living:
            return
        user = self._living[self._chance.choice(list(self._living))]
        version = user.version if self._chance.random() < 0.5 else 0
        self._own(await self._settle(self._update_request(self._op(), user.id, version, names=True)))

    async def _update_shared(self) -> None:
        if self._shared:
            user_id = self._chance.choice(self._shared[-20:])
            await self._settle(self._update_request(self._op(), user_id, 0, names=False))

    async def _stale(self) -> None:
        if self._living:
            user = self._living[self._chance.choice(list(self._living))]
            await self._settle(self._update_request(self._op(), user.id, user.version + 7, names=False))

    async def _delete(self) -> None:
        if len(self._living) < 2:
            return
        user = self._living[self._chance.choice(list(self._living))]
        request = users_pb2.DeleteUserRequest(id=user.id, version=user.version, request_id=self._request_id())
        intent = Intent(self._op(), "DeleteUser", time.monotonic(), [], user.id)
        self._own(await self._settle(Asked(intent, request)))

    async def _undelete(self) -> None:
        if not self._deleted:
            return
        user_id = self._chance.choice(list(self._deleted))
        request = users_pb2.UndeleteUserRequest(id=user_id, request_id=self._request_id())
        users = await self._settle(Asked(Intent(self._op(), "UndeleteUser", time.monotonic(), [], user_id), request))
        if users is None:
            # Purged, or its name is taken: gone for this caller.
            self._deleted.pop(user_id)
        self._own(users)

    def _batch_request(self, count: int, **fields: object) -> Asked:
        op = self._op()
        tags = [f"{op}.{index}" for index in range(count)]
        requests = [self._create_request(tag, **fields) for tag in tags]
        intent = Intent(op, "BatchCreateUsers", time.monotonic(), tags, "")
        return Asked(intent, users_pb2.BatchCreateUsersRequest(requests=requests))

    async def _batch(self) -> None:
        self._own(await self._settle(self._batch_request(self._chance.randint(2, 15))))

    async def _large_batch(self) -> None:
        # More than a message holds.
        await self._settle(self._batch_request(150, labels=_LARGE))

    async def _batch_with_taken(self) -> None:
        if self._living:
            asked = self._batch_request(self._chance.randint(2, 10))
            taken = self._chance.choice(asked.request.requests)
            taken.user.username = self._living[self._chance.choice(list(self._living))].username
            await self._settle(asked)

    async def _taken(self) -> None:
        if self._living:
            op, other = self._op(), self._living[self._chance.choice(list(self._living))]
            field = self._chance.choice(["username", "email"])
            request = self._create_request(op, **{field: getattr(other, field)})
            await self._settle(Asked(Intent(op, "CreateUser", time.monotonic(), [op], ""), request))

    async def _invalid(self) -> None:
        op = self._op()
        request = self._create_request(op, email="nobody")
        await self._settle(Asked(Intent(op, "CreateUser", time.monotonic(), [op], ""), request))

    async def _validate(self) -> None:
        op = self._op()
        request = self._create_request(op)
        request.validate_only = True
        await self._asker.settle(
            Asked(Intent(op, "CreateUser", time.monotonic(), [op], "", stores=False), request), self._chance
        )

    async def _again(self) -> None:
        if self._recent:
            await self._asker.settle(self._chance.choice(self._recent), self._chance, again=True)


async def _command(commands: Commands, asker: Asker, callers: int) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while not commands.stopped:
        command = (await reader.readline()).decode().strip()
        if command == "pause":
            commands.going.clear()
            async with commands.changed:
                await commands.changed.wait_for(lambda: commands.resting == callers)
        elif command != "count":
            # Also at the end of the input: the run is gone.
            commands.stopped = command != "go"
            commands.going.set()
        print(asker.answered, flush=True)


async def _write(asked: argparse.Namespace) -> None:
    journal = Journal(Path(asked.directory) / "writers.jsonl")
    asker = Asker(asked.addresses.split(","), journal)
    commands, shared = Commands(), list[str]()
    callers = [
        Caller(number, asked.seed, asker, commands, shared, asked.pause, asked.large).run()
        for number in range(asked.callers)
    ]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_command(commands, asker, asked.callers))
        for caller in callers:
            tasks.create_task(caller)
    await asker.close()
    journal.close()
    print("settled", flush=True)


def main() -> None:
    """Reads the arguments and writes until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.writers")
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.1, help="mean time between two changes of a caller, seconds")
    parser.add_argument(
        "--large", type=float, default=0.4, help="weight of batches that no message holds, of about 110"
    )
    uvloop.run(_write(parser.parse_args()))


if __name__ == "__main__":
    main()
