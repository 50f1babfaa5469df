"""PreferenceService as callers see it: checks a request, asks the store, and answers with what applies."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import grpc.aio

from notification_service import errors, preference_check, preferences, tokens
from notification_service.api import requests
from notification_service.categories import OTHERS, Categories, Category
from notification_service.domain import CHANNELS, EMAIL
from notification_service.preferences import Source
from notification_service.store import preferences as stored_preferences
from notification_service.store import suppressions
from notification_service.store.preferences import Stored
from servicekit import callers, logs, rpc
from servicekit.database import Pool
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import preferences_pb2, preferences_pb2_grpc

log = logs.get(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
_Effective = preferences_pb2.Preferences.Effective
_Reason = preferences_pb2.Suppression.Reason

_LONGEST_DETAIL = 500
_LONGEST_ADDRESS = 320
_ADDRESS = re.compile(r"[^\s\x00-\x1f\x7f@]+@[^\s\x00-\x1f\x7f@]+")

_SOURCES = {
    Source.DEFAULT: _Effective.DEFAULT,
    Source.CHANNEL: _Effective.CHANNEL,
    Source.CATEGORY: _Effective.CATEGORY,
    Source.MANDATORY: _Effective.MANDATORY,
}


class PreferenceService(preferences_pb2_grpc.PreferenceServiceServicer):
    """The servicer."""

    def __init__(self, pool: Pool, categories: Categories) -> None:
        self._pool = pool
        self._categories = categories

    async def GetPreferences(
        self, request: preferences_pb2.GetPreferencesRequest, context: _Context
    ) -> preferences_pb2.Preferences:
        user_id = requests.one_id(request.user_id, "user_id")
        async with requests.connection(self._pool) as connection:
            found = await stored_preferences.find(connection, user_id)
        return _message(user_id, found, self._categories)

    async def UpdatePreferences(
        self, request: preferences_pb2.UpdatePreferencesRequest, context: _Context
    ) -> preferences_pb2.Preferences:
        user_id = requests.one_id(request.preferences.user_id, "preferences.user_id")
        changes = _changes(request)
        if found := preference_check.violations(changes, self._categories):
            raise invalid(*found)
        async with requests.connection(self._pool) as connection:
            stored = await stored_preferences.change(connection, user_id, changes, version=request.preferences.version)
        return _message(user_id, stored, self._categories)

    async def ListCategories(
        self, request: preferences_pb2.ListCategoriesRequest, context: _Context
    ) -> preferences_pb2.ListCategoriesResponse:
        named = self._categories.named
        entries = [*(named[name] for name in sorted(named)), self._categories.others]
        return preferences_pb2.ListCategoriesResponse(categories=[_category(entry) for entry in entries])

    async def CreateSuppression(
        self, request: preferences_pb2.CreateSuppressionRequest, context: _Context
    ) -> preferences_pb2.Suppression:
        given = request.suppression
        violations = [*_address("suppression.", given.channel, given.target)]
        if given.reason not in _Reason.values() or not given.reason:
            violations.append(Violation("suppression.reason", "is required: why the address is suppressed"))
        if len(given.detail) > _LONGEST_DETAIL:
            violations.append(Violation("suppression.detail", f"must be at most {_LONGEST_DETAIL} characters"))
        if "\0" in given.detail:
            violations.append(Violation("suppression.detail", "must not have a NUL character"))
        if violations:
            raise invalid(*violations)
        reason = _Reason.Name(given.reason)
        async with requests.connection(self._pool) as connection:
            made = await suppressions.create(
                connection,
                channel=given.channel,
                target=given.target,
                reason=reason,
                detail=given.detail,
                actor=callers.name_of(context),
            )
        log.info("address suppressed", channel=given.channel, reason=reason)
        return _suppression(made)

    async def GetSuppression(
        self, request: preferences_pb2.GetSuppressionRequest, context: _Context
    ) -> preferences_pb2.Suppression:
        if violations := [*_address("", request.channel, request.target)]:
            raise invalid(*violations)
        async with requests.connection(self._pool) as connection:
            found = await suppressions.find(connection, channel=request.channel, target=request.target)
        if found is None:
            raise errors.not_suppressed(request.channel, request.target)
        return _suppression(found)

    async def ListSuppressions(
        self, request: preferences_pb2.ListSuppressionsRequest, context: _Context
    ) -> preferences_pb2.ListSuppressionsResponse:
        filters = _filters(request.filter)
        size = rpc.page_size(request.page_size)
        selection = tokens.selection_hash("ListSuppressions", *(f"{name}={filters[name]}" for name in sorted(filters)))
        after = tokens.decode_key(request.page_token, selection) if request.page_token else ("", "")
        async with requests.connection(self._pool) as connection:
            found = await suppressions.page(connection, filters, after, size + 1)
        last = found[size - 1] if len(found) > size else None
        return preferences_pb2.ListSuppressionsResponse(
            suppressions=[_suppression(one) for one in found[:size]],
            next_page_token=tokens.encode_key((last.channel, last.target), selection) if last else "",
        )

    async def DeleteSuppression(
        self, request: preferences_pb2.DeleteSuppressionRequest, context: _Context
    ) -> preferences_pb2.Suppression:
        if violations := [*_address("", request.channel, request.target)]:
            raise invalid(*violations)
        async with requests.connection(self._pool) as connection:
            removed = await suppressions.remove(connection, channel=request.channel, target=request.target)
        log.info("suppression ended", channel=removed.channel, reason=removed.reason)
        return _suppression(removed)


def _changes(request: preferences_pb2.UpdatePreferencesRequest) -> dict[str, Any]:
    """The fields of the mask, as a document has them."""
    paths = request.update_mask.paths
    known = ", ".join(preference_check.FIELDS)
    if not paths:
        raise invalid(Violation("update_mask", f"is required: any of {known}"))
    unknown = dict.fromkeys(path for path in paths if path not in preference_check.FIELDS)
    if unknown:
        raise invalid(*(Violation("update_mask", f"{path!r} is not one of {known}") for path in unknown))
    given = request.preferences
    document: dict[str, Any] = {
        "channels": dict(given.channels),
        "categories": {name: dict(choices.channels) for name, choices in given.categories.items()},
        "quiet_hours": _hours(given.quiet_hours) if given.HasField("quiet_hours") else {},
    }
    return {path: document[path] for path in paths}


def _hours(given: preferences_pb2.Preferences.QuietHours) -> dict[str, Any]:
    hours: dict[str, Any] = {"start": given.start, "end": given.end}
    if given.weekdays:
        hours["weekdays"] = sorted(given.weekdays)
    if given.time_zone:
        hours["time_zone"] = given.time_zone
    return hours


def _message(user_id: uuid.UUID, stored: Stored, categories: Categories) -> preferences_pb2.Preferences:
    document = stored.document
    message = preferences_pb2.Preferences(
        user_id=str(user_id),
        channels=document.get("channels", {}),
        version=stored.version,
        effective=_effective(document, categories),
    )
    for name, choices in document.get("categories", {}).items():
        message.categories[name].channels.update(choices)
    if hours := document.get("quiet_hours"):
        message.quiet_hours.CopyFrom(preferences_pb2.Preferences.QuietHours(**hours))
    if stored.update_time:
        message.update_time.FromDatetime(stored.update_time)
    return message


def _effective(document: Mapping[str, Any], categories: Categories) -> Iterator[_Effective]:
    names = sorted({*categories.named, *document.get("categories", {})})
    for name in (*names, OTHERS):
        rules = categories.of(name)
        for channel in CHANNELS:
            applies = preferences.effective(document, name, rules, channel)
            yield _Effective(
                category=name,
                channel=channel,
                on=applies.on,
                source=_SOURCES[applies.source],
                quiet_hours=channel == EMAIL and applies.on and rules.waits and bool(document.get("quiet_hours")),
            )


def _category(entry: Category) -> preferences_pb2.Category:
    return preferences_pb2.Category(
        name=entry.name, mandatory=entry.mandatory, quiet_hours=entry.waits, off=sorted(entry.off)
    )


def _address(path: str, channel: str, target: str) -> Iterator[Violation]:
    if channel != EMAIL:
        yield Violation(f"{path}channel", f"must be {EMAIL}")
    if len(target) > _LONGEST_ADDRESS or not _ADDRESS.fullmatch(target):
        yield Violation(f"{path}target", f"must be an address of at most {_LONGEST_ADDRESS} characters")


def _filters(asked: preferences_pb2.ListSuppressionsRequest.Filter) -> dict[str, Any]:
    """What a filter selects, by column."""
    filters = {name: value for name in ("channel", "target") if (value := getattr(asked, name))}
    violations = [
        Violation(f"filter.{name}", "must not have a NUL character") for name, value in filters.items() if "\0" in value
    ]
    if asked.reason not in _Reason.values():
        violations.append(Violation("filter.reason", "is no reason of a suppression"))
    elif asked.reason:
        filters["reason"] = _Reason.Name(asked.reason)
    if violations:
        raise invalid(*violations)
    return filters


def _suppression(row: suppressions.Suppression) -> preferences_pb2.Suppression:
    message = preferences_pb2.Suppression(
        channel=row.channel,
        target=row.target,
        reason=_Reason.Value(row.reason),
        detail=row.detail,
        actor=row.actor,
    )
    message.create_time.FromDatetime(row.create_time)
    return message
