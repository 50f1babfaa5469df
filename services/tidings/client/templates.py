"""The templates that notifications are said with: looked at, tried, reloaded."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import grpc.aio
from google.protobuf import struct_pb2

from tidings.client.unary import PAGE_SIZE, TIMEOUT, answer, pages
from tidings.notifications.v1 import templates_pb2, templates_pb2_grpc

# A test-send waits for a mail server, a reload for every template to be compiled; seconds.
_LONG_TIMEOUT = 60.0


def _sample(given: Mapping[str, Any] | None) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(dict(given or {}))
    return made


class Templates:
    """Calls TemplateService. `timeout` bounds each call, in seconds. Every method raises ApiError. A `sample` has what
    differs from a made-up one, as PreviewTemplateRequest explains it.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = TIMEOUT) -> None:
        self._stub = templates_pb2_grpc.TemplateServiceStub(channel)
        self._timeout = timeout

    async def list(self, *, page_size: int = PAGE_SIZE) -> AsyncGenerator[templates_pb2.Template, None]:
        """The templates in use, by name; pages are fetched as they are needed."""
        async for page in self.pages(page_size=page_size):
            for template in page.templates:
                yield template

    async def pages(self, *, page_size: int = PAGE_SIZE) -> AsyncGenerator[templates_pb2.ListTemplatesResponse, None]:
        """The same by pages, each with the version in use and why changed files are refused."""
        request = templates_pb2.ListTemplatesRequest(page_size=page_size)
        async for page in pages(self._stub.ListTemplates, request, self._timeout):
            yield page

    async def preview(
        self, template: str, *, locale: str = "", sample: Mapping[str, Any] | None = None, html: bool = True
    ) -> templates_pb2.PreviewTemplateResponse:
        """What a template says for a sample."""
        request = templates_pb2.PreviewTemplateRequest(
            template=template, locale=locale, sample=_sample(sample), without_html=not html
        )
        return await answer(self._stub.PreviewTemplate(request, timeout=self._timeout))

    async def send_test(
        self, template: str, to: str, *, locale: str = "", sample: Mapping[str, Any] | None = None
    ) -> templates_pb2.SendTestTemplateResponse:
        """Mails what a template says for a sample to an address, once; how that went."""
        request = templates_pb2.SendTestTemplateRequest(template=template, to=to, locale=locale, sample=_sample(sample))
        return await answer(self._stub.SendTestTemplate(request, timeout=_LONG_TIMEOUT))

    async def reload(self) -> templates_pb2.ReloadTemplatesResponse:
        """Lets the replica that answers use the files as they are now."""
        return await answer(self._stub.ReloadTemplates(templates_pb2.ReloadTemplatesRequest(), timeout=_LONG_TIMEOUT))
