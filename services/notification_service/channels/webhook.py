"""Webhooks over HTTP, signed as Standard Webhooks has it.

The body is the same at every attempt, and so is webhook-id; the timestamp and with it the signature are the attempt's
own. No redirect is followed, for a signed body goes nowhere the operator did not name, and nothing is connected to that
`egress` forbids. The status of an answer decides; of its body only the beginning is read, if that comes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http import HTTPStatus

import aiohttp
import psycopg
from aiohttp.helpers import is_ip_address
from yarl import URL

from notification_service.channels import Draft, Message, Outcome, Says, outcome
from notification_service.destinations import Destination, State
from notification_service.domain import WEBHOOK, Delivery, Result, delivery_id
from notification_service.egress import CheckedResolver, ForbiddenAddressError, Network, check
from notification_service.registry import Endpoints

_READ_BYTES = 512
_READ_TIME = 1.0  # seconds
# URLs of which it is known that they may be called.
_MOST_URLS = 1000

# Answers below 500 that are worth another attempt: time-out, too early, too many.
_RETRYABLE = frozenset({408, 425, 429})

# Of those the ones that say nothing about the next call.
_OF_ONE_CALL = frozenset({408, 425})


@dataclass(frozen=True, slots=True)
class WebhookWriter:
    """Makes a call to each endpoint that wants to know; `endpoints` is looked at each time, for they may change."""

    endpoints: Iterable[Destination]

    @property
    def says(self) -> Says:
        """Nothing: machines get the facts."""
        return Says.NOTHING

    def compose(self, draft: Draft) -> Iterator[Delivery]:
        """See Writer. The body is made once: its bytes are stored and sent as they are."""
        wanting = [endpoint for endpoint in self.endpoints if endpoint.wants(draft.kind, draft.category)]
        if not wanting:
            return
        content = json.dumps(draft.payload(), ensure_ascii=False, separators=(",", ":")).encode()
        for endpoint in wanting:
            identity = delivery_id(draft.id, WEBHOOK, endpoint.target)
            yield Delivery(identity, WEBHOOK, endpoint.target, str(identity), content)


class WebhookChannel:
    """Calls endpoints at public addresses and in the networks that are allowed besides, and tells `endpoints` which say
    that they are gone.
    """

    def __init__(
        self, endpoints: Endpoints, *, connections: int, timeout: float, networks: Sequence[Network] = ()
    ) -> None:
        self._check_literal = lru_cache(_MOST_URLS)(partial(_check_literal, networks=tuple(networks)))
        self._endpoints = endpoints
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, resolver=CheckedResolver(networks)),
            timeout=aiohttp.ClientTimeout(total=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={
                "User-Agent": "tidings-webhooks/1",
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
            },
        )

    async def send(self, message: Message) -> Outcome:
        """Makes one attempt."""
        try:
            endpoint = await self._endpoints.find(message.target)
        except psycopg.OperationalError:
            return outcome(Result.FAILED, 0, "the endpoint cannot be looked up: the database is not reachable")
        if endpoint is None:
            return outcome(Result.REFUSED, 0, "this endpoint is no longer configured")
        if endpoint.state is State.DISABLED:
            return outcome(Result.FAILED, 0, "the endpoint is disabled; it was not called")
        answer = await self.call(endpoint, message)
        if answer.code == HTTPStatus.GONE:
            await self._endpoints.gone(endpoint, answer.detail)
        return answer

    async def call(self, endpoint: Destination, message: Message) -> Outcome:
        """Calls an endpoint, a disabled one too, whatever the message's target is."""
        now = datetime.now(UTC)
        body = message.content.decode()
        headers = {
            "webhook-id": message.idempotency_key,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(
                signer.sign(message.idempotency_key, now, body) for signer in endpoint.signers(now)
            ),
        }
        if message.trace_parent:
            headers["traceparent"] = message.trace_parent
        if message.trace_state:
            headers["tracestate"] = message.trace_state
        try:
            self._check_literal(endpoint.url)
            async with self._session.post(
                endpoint.url, data=message.content, headers=headers, allow_redirects=False
            ) as response:
                answer = await _beginning(response)
                return judge(response.status, answer.decode(errors="replace"), response.headers.get("Retry-After"), now)
        except TimeoutError:
            return outcome(Result.FAILED, 0, "no answer in time", outage=True)
        except ForbiddenAddressError as error:
            return _forbidden(error)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ForbiddenAddressError):
                return _forbidden(error.os_error)
            return outcome(Result.FAILED, 0, f"{type(error).__name__}: {error}", outage=True)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return outcome(Result.FAILED, 0, f"{type(error).__name__}: {error}", outage=True)

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """The beginning of an answer's body, as far as it comes: what the answer means says its status."""
    answer = b""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_READ_TIME):
            answer = await response.content.read(_READ_BYTES)
    if not response.content.at_eof():
        response.close()  # the rest is not read, so the connection is of no more use
    return answer


def _check_literal(url: str, networks: Sequence[Network]) -> None:
    """A host that is an address already is not resolved. Raises ForbiddenAddressError."""
    host = URL(url).host or ""
    if is_ip_address(host):
        check(host, networks)


def _forbidden(error: ForbiddenAddressError) -> Outcome:
    return outcome(Result.REFUSED, 0, f"{error}; TIDINGS_NOTIFICATIONS_WEBHOOK_NETWORKS allows others")


def judge(status: int, answer: str, retry_after: str | None, now: datetime) -> Outcome:
    """What an answer means."""
    if 200 <= status < 300:
        return outcome(Result.SUCCEEDED, status, answer)
    if status >= 500 or status in _RETRYABLE:
        return outcome(Result.FAILED, status, answer, _seconds(retry_after, now), outage=status not in _OF_ONE_CALL)
    if 300 <= status < 400:
        return outcome(Result.REFUSED, status, "answered with a redirect, which is not followed")
    return outcome(Result.REFUSED, status, answer)


def _seconds(retry_after: str | None, now: datetime) -> float | None:
    if not retry_after:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())
