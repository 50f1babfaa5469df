"""SendService as callers see it: checks a request, tries its template, stores a send, and tells how sends stand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
from uuid_utils.compat import uuid7

from notification_service import errors, sent
from notification_service.api import requests
from notification_service.compose import Composer
from notification_service.domain import CHANNELS, SendState
from notification_service.sender import settle_now
from notification_service.store import audience, recipients, settling
from notification_service.store import sends as store
from notification_service.store.sends import New
from notification_service.templates import RenderError
from servicekit import callers, logs, tracing
from servicekit.database import Pool
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import sends_pb2 as pb
from tidings.notifications.v1 import sends_pb2_grpc

log = logs.get(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]

# Asks the user service for its log and the newest position.
Head = Callable[[], Awaitable[tuple[uuid.UUID, int]]]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MOST_IDS = 1000
_MOST_NAMED = 10
_MOST_LABELS = 32
_LONGEST_LABEL_KEY, _LONGEST_LABEL_VALUE = 63, 256
_LONGEST_PREFIX = 320
_LARGEST_PARAMS = 16_000
_FURTHEST = timedelta(days=366)
# Each has a process of its own.
_MOST_TRIED_AT_ONCE = 2


class SendService(sends_pb2_grpc.SendServiceServicer):
    """The servicer. `stored` is called when there is something for the sender to do."""

    def __init__(self, pool: Pool, composer: Composer, head: Head, stored: Callable[[], None]) -> None:
        self._pool = pool
        self._composer = composer
        self._head = head
        self._stored = stored
        self._tried = asyncio.Semaphore(_MOST_TRIED_AT_ONCE)

    async def SendNotification(self, request: pb.SendNotificationRequest, context: _Context) -> pb.Send:
        new = _new(request, callers.name_of(context), *tracing.incoming(context))
        async with requests.connection(self._pool) as connection:
            made = await store.made_by(connection, new.actor, new.request_id, new.request_hash)
            found = None if made is None else await store.find(connection, made)
        if found is not None:
            return found
        await self._try(new)
        if request.validate_only:
            return await self._counted(request.send, new)
        log_id, position = await self._place()
        async with requests.connection(self._pool) as connection:
            stored, is_new = await store.create(connection, new, log_id, position)
        if is_new:
            log.info("a send is stored", send_id=stored.id, template=new.template)
            self._stored()
        return stored

    async def GetSend(self, request: pb.GetSendRequest, context: _Context) -> pb.Send:
        return await self._found(requests.one_id(request.id))

    async def ListSends(self, request: pb.ListSendsRequest, context: _Context) -> pb.ListSendsResponse:
        asked = request.filter
        filters: dict[str, Any] = {}
        if asked.state:
            if asked.state not in {int(state) for state in SendState}:
                raise invalid(Violation("filter.state", "is no state of a send"))
            filters["state"] = int(asked.state)
        for name in ("category", "actor"):
            if text := getattr(asked, name):
                if "\0" in text:
                    raise invalid(Violation(f"filter.{name}", "must not have a NUL character"))
                filters[name] = text
        size, selection, before = requests.page(request, filters)
        async with requests.connection(self._pool) as connection:
            found = await store.page(connection, filters, before, size + 1)
        return pb.ListSendsResponse(
            sends=[one.send for one in found[:size]],
            next_page_token=requests.next_page([one.position for one in found], size, selection),
        )

    async def CancelSend(self, request: pb.CancelSendRequest, context: _Context) -> pb.Send:
        identity = requests.one_id(request.id)
        async with requests.connection(self._pool) as connection:
            if await settling.cancel(connection, identity):
                await settle_now(connection, identity)
                log.info("a send is cancelled", send_id=request.id)
                self._stored()
        return await self._found(identity)

    async def _found(self, identity: uuid.UUID) -> pb.Send:
        async with requests.connection(self._pool) as connection:
            found = await store.find(connection, identity)
        if found is None:
            raise errors.unknown_send(str(identity))
        return found

    async def _try(self, new: New) -> None:
        """Renders what is to be sent for a made-up user. Raises UNKNOWN_TEMPLATE, TEMPLATE_FAILED."""
        if new.template not in self._composer.templates.current.files.names():
            raise errors.unknown_template(new.template)
        async with self._tried:
            try:
                await asyncio.to_thread(self._tried_apart, new)
            except RenderError as error:
                raise errors.template_failed(str(error)) from None

    def _tried_apart(self, new: New) -> None:
        apart = self._composer.templates.apart()
        try:
            sent.try_out(new.template, new.channels, new.params, apart, self._composer.writers)
        finally:
            apart.close()

    async def _counted(self, send: pb.Send, new: New) -> pb.Send:
        """A send that is not stored, and whom it would come to now."""
        answer = pb.Send()
        answer.CopyFrom(send)
        answer.actor = new.actor
        async with requests.connection(self._pool) as connection:
            if new.user_ids is None:
                answer.counts.matched = await audience.count(connection, new.filter or {})
                return answer
            people, deleted = await audience.of_ids(connection, new.user_ids)
        unknown = set(new.user_ids) - deleted - {one.user_id for one in people}
        answer.counts.matched, answer.counts.deleted = len(new.user_ids), len(deleted)
        answer.counts.unknown = len(unknown)
        answer.unknown_user_ids.extend(str(one) for one in sorted(unknown)[: store.MOST_UNKNOWN])
        return answer

    async def _place(self) -> tuple[uuid.UUID | None, int]:
        """How new the copy of the users is to be: as the feed is now or, if that cannot be asked, as was last heard."""
        try:
            return await self._head()
        except grpc.aio.AioRpcError as error:
            log.warning("the user service cannot be asked how far its feed is", error=error.code().name)
        async with requests.connection(self._pool) as connection:
            log_id, _, head = await recipients.place(connection)
        return log_id, head


def _new(request: pb.SendNotificationRequest, actor: str, trace_parent: str, trace_state: str) -> New:
    """What is to be stored. Raises INVALID_FIELD with every wrong field."""
    given, violations = request.send, list[Violation]()
    request_id = uuid.UUID(int=0)
    try:
        request_id = uuid.UUID(request.request_id)
    except ValueError:
        violations.append(Violation("request_id", "must be a UUID" if request.request_id else "is required"))
    wrong = "must be 1 to 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit"
    for name in ("template", "category"):
        text = getattr(given, name)
        if not _NAME.fullmatch(text):
            violations.append(Violation(f"send.{name}", wrong if text else "is required"))
    violations += _wrong_channels(given.channels)
    params = _params(given, violations)
    send_time = _send_time(given, violations)
    user_ids = filter_ = None
    match given.recipients.WhichOneof("to"):
        case "user_ids":
            user_ids = _user_ids(given.recipients.user_ids.ids, violations)
        case "filter":
            filter_ = _filter(given.recipients.filter, violations)
        case _:
            violations.append(Violation("send.recipients", "is required: user_ids or filter"))
    if violations:
        raise invalid(*violations)
    said = json.dumps(
        [
            given.template,
            given.category,
            sorted(given.channels),
            params,
            None if user_ids is None else [str(one) for one in user_ids],
            filter_,
            send_time.isoformat() if send_time else None,
        ],
        sort_keys=True,
    )
    return New(
        uuid7(),
        given.template,
        given.category,
        [name for name in CHANNELS if name in given.channels],
        params,
        user_ids,
        filter_,
        send_time,
        actor,
        request_id,
        hashlib.sha256(said.encode()).digest(),
        trace_parent,
        trace_state,
    )


def _wrong_channels(names: Sequence[str]) -> list[Violation]:
    known = ", ".join(CHANNELS)
    if not names:
        return [Violation("send.channels", f"is required: any of {known}")]
    found = [
        Violation(f"send.channels[{index}]", f"must be one of {known}")
        for index, name in enumerate(names)
        if name not in CHANNELS
    ]
    if len(set(names)) < len(names):
        found.append(Violation("send.channels", "names one twice"))
    return found[:_MOST_NAMED]


def _params(given: pb.Send, violations: list[Violation]) -> dict[str, Any]:
    try:
        params: dict[str, Any] = requests.plain(given.params)
    except (ValueError, TypeError) as error:
        violations.append(Violation("send.params", f"cannot be written as JSON: {error}"[:200]))
        return {}
    text = json.dumps(params, ensure_ascii=False)
    if len(text.encode()) > _LARGEST_PARAMS:
        violations.append(Violation("send.params", f"must be at most {_LARGEST_PARAMS} bytes as JSON"))
    # The JSON of a NUL, which Postgres does not keep.
    if "\\u0000" in text:
        violations.append(Violation("send.params", "must not have a NUL character"))
    return params


def _send_time(given: pb.Send, violations: list[Violation]) -> datetime | None:
    if not given.HasField("send_time"):
        return None
    try:
        time = given.send_time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        violations.append(Violation("send.send_time", "must be a time of the years 1 to 9999"))
        return None
    if time > datetime.now(UTC) + _FURTHEST:
        violations.append(Violation("send.send_time", "must be at most a year ahead"))
    return time


def _user_ids(texts: Sequence[str], violations: list[Violation]) -> list[uuid.UUID]:
    path = "send.recipients.user_ids.ids"
    if not 1 <= len(texts) <= _MOST_IDS:
        violations.append(Violation(path, f"must be 1 to {_MOST_IDS}"))
        return []
    wrong: list[Violation] = []
    found = requests.each_id(texts, path, wrong)
    violations += wrong[:_MOST_NAMED]
    return sorted(set(found))


def _filter(given: pb.Send.Filter, violations: list[Violation]) -> dict[str, Any]:
    path = "send.recipients.filter"
    found: dict[str, Any] = {}
    if labels := dict(given.labels):
        found["labels"] = labels
        violations += _wrong_labels(labels, f"{path}.labels")
    for name in ("username_prefix", "email_prefix", "locale"):
        text = getattr(given, name)
        if not text:
            continue
        found[name] = text
        if len(text) > _LONGEST_PREFIX:
            violations.append(Violation(f"{path}.{name}", f"must be at most {_LONGEST_PREFIX} characters"))
        if "\0" in text:
            violations.append(Violation(f"{path}.{name}", "must not have a NUL character"))
    if given.all and found:
        violations.append(Violation(f"{path}.all", "must not be set beside other conditions"))
    if not given.all and not found:
        violations.append(Violation(path, "is empty: set all to send to everybody"))
    return {"all": True} if given.all else found


def _wrong_labels(labels: Mapping[str, str], path: str) -> list[Violation]:
    if len(labels) > _MOST_LABELS:
        return [Violation(path, f"must be at most {_MOST_LABELS}")]
    found = []
    for key, value in labels.items():
        if not 1 <= len(key.encode()) <= _LONGEST_LABEL_KEY:
            found.append(Violation(path, f"key {key[:80]!r} must be 1 to {_LONGEST_LABEL_KEY} bytes"))
        if len(value.encode()) > _LONGEST_LABEL_VALUE:
            found.append(Violation(f"{path}.{key[:80]}", f"must be at most {_LONGEST_LABEL_VALUE} bytes"))
        if "\0" in key or "\0" in value:
            found.append(Violation(path, "must not hold NUL"))
    return found[:_MOST_NAMED]
