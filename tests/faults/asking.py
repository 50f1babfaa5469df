"""Asks for a change until it is known what became of it, and writes everything down.

Every change has request_ids. An attempt whose outcome is not known is repeated with the same request on whichever
replica comes next, so that it happens once at most.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.faults.journal import Journal
from tests.proof.records import Attempt, Intent, Outcome, state
from tidings.users.v1 import users_pb2, users_pb2_grpc

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 300),
]
# Shorter than some pauses: answers get lost.
_CALL_TIMEOUT = 3.0
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}
_DID_NOTHING = {"DATABASE_UNAVAILABLE", "SHUTTING_DOWN", "WRITE_QUEUE_FULL"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A change with the request that asks for it."""

    intent: Intent
    request: Any


def reason_of(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    """The stable reason of an error and its metadata; "" if it has none."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        detail.Unpack(info)
    return info.reason, dict(info.metadata)


def _classify(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    reason, _ = reason_of(error)
    if error.code() in _REFUSALS:
        return "refused", reason
    if reason in _DID_NOTHING or (error.details() or "").startswith("failed to connect"):
        return "nothing", reason
    return "unsure", f"{error.code().name} {reason}".strip()


class Asker:
    """The callers of one process, on a channel of each replica."""

    def __init__(self, addresses: Sequence[str], journal: Journal) -> None:
        self._channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for address in addresses]
        self._stubs = [users_pb2_grpc.UserServiceStub(channel) for channel in self._channels]
        self._journal = journal
        self.answered = 0

    async def settle(self, asked: Asked, chance: random.Random, *, again: bool = False) -> list[users_pb2.User] | None:
        """Asks until the outcome is known; the users it answers with, or None if it is refused."""
        op = asked.intent.op
        if not again:
            await self._journal.sure(asked.intent)
        replica = chance.randrange(len(self._stubs))
        while True:
            attempt = Attempt(op, replica, time.monotonic())
            self._journal.note(attempt)
            users: list[users_pb2.User] = []
            try:
                answer = await getattr(self._stubs[replica], asked.intent.method)(asked.request, timeout=_CALL_TIMEOUT)
            except grpc.aio.AioRpcError as error:
                result, reason = _classify(error)
            else:
                users = list(answer.users) if isinstance(answer, users_pb2.BatchCreateUsersResponse) else [answer]
                result, reason = "done", ""
            outcome = Outcome(op, time.monotonic(), result, reason, [state(user) for user in users])
            # An answer counts from here on.
            await self._journal.sure(outcome)
            if result in ("done", "refused"):
                self.answered += 1
                return users if result == "done" else None
            await asyncio.sleep(0.02 + chance.random() * 0.1)
            replica = (replica + 1) % len(self._stubs)

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            await channel.close()
