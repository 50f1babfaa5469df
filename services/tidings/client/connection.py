"""One call of a streaming method, read message by message under a watchdog.

The watchdog runs only while a read waits: a caller may take its time with a message. When nothing has come for too long
it cancels the call, once. A read is never wrapped in a timeout: cancelling reads one by one leaks memory in grpc.aio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import grpc.aio

from tidings.client.errors import ApiError, TidingsError, api_error, feed_refusal

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class End:
    """Why a connection is over, and how long the server wants its client to wait before the next (seconds)."""

    reason: str
    wait: float | None = None
    # What the call ended with, if it was not OK.
    error: ApiError | None = None


class Connection(Generic[Message]):
    """Reads a call. `close` must be called. `silence` is in seconds; `refusal` makes of an error what is raised, or
    None if reconnecting may help.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[Any, Message] | grpc.aio.StreamStreamCall[Any, Message],
        silence: float,
        *,
        refusal: Callable[[ApiError], TidingsError | None] = feed_refusal,
    ) -> None:
        self._call = call
        self._refusal = refusal
        self._messages = cast("AsyncGenerator[Message, None]", aiter(call))
        self._silence = silence
        self._loop = asyncio.get_running_loop()
        self._reading_since: float | None = None
        self._silent = False
        self._watchdog = self._loop.call_later(silence, self._look)

    async def read(self) -> Message | End:
        """The next message, or why there is none. Raises the refusal if reconnecting would not help."""
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        self._reading_since = self._loop.time()
        try:
            return await anext(self._messages)
        except StopAsyncIteration:
            return End("the server ended the stream")
        except grpc.aio.AioRpcError as error:
            known = api_error(error)
            refusal = self._refusal(known)
            if refusal is not None:
                raise refusal from error
            return End(f"{known.reason}: {known.message}", known.retry_after, known)
        except asyncio.CancelledError:
            # The watchdog's cancellation of the call comes up like one of the task; only the latter is counted.
            if not self._silent or (task and task.cancelling() > cancellations):
                raise
            return End(f"no message for {self._silence:g} s")
        finally:
            self._reading_since = None

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self._reading_since is None else self._reading_since
        if now - since >= self._silence:
            self._silent = True
            self._call.cancel()
            return
        self._watchdog = self._loop.call_later(since + self._silence - now, self._look)

    async def close(self) -> None:
        """Ends the call."""
        self._watchdog.cancel()
        self._call.cancel()
        await self._messages.aclose()
