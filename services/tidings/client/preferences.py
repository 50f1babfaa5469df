"""What users want to be told, when, and which addresses are not written to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

import grpc.aio
from google.protobuf import field_mask_pb2

from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, pages
from tidings.notifications.v1 import preferences_pb2, preferences_pb2_grpc


class Preferences:
    """Calls PreferenceService. `timeout` bounds each call, in seconds. Every method raises ApiError."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = preferences_pb2_grpc.PreferenceServiceStub(channel)
        self._timeout = timeout

    async def get(self, user_id: str) -> preferences_pb2.Preferences:
        """What a user decided, and what therefore applies; version 0 for one who decided nothing."""
        request = preferences_pb2.GetPreferencesRequest(user_id=user_id)
        return await answer(self._stub.GetPreferences(request, timeout=self._timeout))

    async def update(
        self, preferences: preferences_pb2.Preferences, fields: Iterable[str]
    ) -> preferences_pb2.Preferences:
        """Changes the named fields (channels, categories, quiet_hours), each as a whole, to what `preferences` has.

        With `preferences.version` set only if that is the current version; otherwise STALE_VERSION: read again.
        """
        request = preferences_pb2.UpdatePreferencesRequest(
            preferences=preferences, update_mask=field_mask_pb2.FieldMask(paths=fields)
        )
        return await answer(self._stub.UpdatePreferences(request, timeout=self._timeout))

    async def categories(self) -> tuple[preferences_pb2.Category, ...]:
        """The service's categories; the last, `*`, is for all others."""
        request = preferences_pb2.ListCategoriesRequest()
        return tuple((await answer(self._stub.ListCategories(request, timeout=self._timeout))).categories)

    async def suppress(
        self,
        target: str,
        reason: preferences_pb2.Suppression.Reason.ValueType = preferences_pb2.Suppression.MANUAL,
        *,
        channel: str = "email",
        detail: str = "",
    ) -> preferences_pb2.Suppression:
        """Suppresses an address; SUPPRESSED if it is already."""
        given = preferences_pb2.Suppression(channel=channel, target=target, reason=reason, detail=detail)
        request = preferences_pb2.CreateSuppressionRequest(suppression=given)
        return await answer(self._stub.CreateSuppression(request, timeout=self._timeout))

    async def suppression(self, target: str, *, channel: str = "email") -> preferences_pb2.Suppression:
        """The suppression of an address, in upper or lower case; NOT_SUPPRESSED if there is none."""
        request = preferences_pb2.GetSuppressionRequest(channel=channel, target=target)
        return await answer(self._stub.GetSuppression(request, timeout=self._timeout))

    async def suppressions(
        self,
        *,
        channel: str = "",
        target: str = "",
        reason: preferences_pb2.Suppression.Reason.ValueType = preferences_pb2.Suppression.REASON_UNSPECIFIED,
        page_size: int = PAGE_SIZE,
    ) -> AsyncGenerator[preferences_pb2.Suppression, None]:
        """Suppressed addresses, by channel and address; pages are fetched as they are needed."""
        request = preferences_pb2.ListSuppressionsRequest(page_size=page_size)
        if channel or target or reason:
            request.filter.channel = channel
            request.filter.target = target
            request.filter.reason = reason
        async for page in pages(self._stub.ListSuppressions, request, self._timeout):
            for suppression in page.suppressions:
                yield suppression

    async def unsuppress(self, target: str, *, channel: str = "email") -> preferences_pb2.Suppression:
        """Ends a suppression and returns it; NOT_SUPPRESSED if there is none."""
        request = preferences_pb2.DeleteSuppressionRequest(channel=channel, target=target)
        return await answer(self._stub.DeleteSuppression(request, timeout=self._timeout))
