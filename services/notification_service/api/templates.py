"""TemplateService as callers see it: lists, tries and reloads the templates in use."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc.aio

from notification_service import errors, gathered, samples, tokens
from notification_service.api import requests
from notification_service.channels import Channel, Message, Outcome
from notification_service.channels.email import Mail, message_id
from notification_service.compose import Composer, addressed
from notification_service.domain import Result, digest_rule, stamp
from notification_service.templates import Rendered, RenderError, Templates
from servicekit import logs, rpc
from servicekit.configfile import InvalidConfigError
from servicekit.errors import Violation, invalid
from tidings.notifications.v1 import templates_pb2, templates_pb2_grpc

log = logs.get(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]

_PARTS = {"subject.txt": "subject", "txt": "text", "html": "html"}
_TEST = "[Test] "
# Each has a process of its own.
_MOST_TRIED_AT_ONCE = 2
_LONGEST_ADDRESS = 254


class TemplateService(templates_pb2_grpc.TemplateServiceServicer):
    """The servicer. Tests are sent over `email` by `sender`, each within `send_timeout` seconds."""

    def __init__(self, composer: Composer, email: Channel, sender: str, *, send_timeout: float) -> None:
        self._composer = composer
        self._templates: Templates = composer.templates
        self._email = email
        self._sender = sender
        self._send_timeout = send_timeout
        self._tried = asyncio.Semaphore(_MOST_TRIED_AT_ONCE)

    async def ListTemplates(
        self, request: templates_pb2.ListTemplatesRequest, context: _Context
    ) -> templates_pb2.ListTemplatesResponse:
        current = self._templates.current
        size = rpc.page_size(request.page_size)
        # A page of another set is no next page.
        selection = tokens.selection_hash("ListTemplates", current.version)
        first = tokens.decode_page(request.page_token, selection) if request.page_token else 0
        names = current.files.names()
        end = first + size
        problems = await asyncio.to_thread(lambda: {name: current.problems_of(name) for name in names[first:end]})
        return templates_pb2.ListTemplatesResponse(
            templates=[
                templates_pb2.Template(
                    name=name,
                    translations=[
                        templates_pb2.Template.Translation(locale=locale, parts=[_PARTS[part] for part in parts])
                        for locale, parts in current.files.locales(name).items()
                    ],
                    rules=self._users_of(name),
                    problems=problems[name],
                )
                for name in names[first:end]
            ],
            next_page_token=tokens.encode_page(end, selection) if end < len(names) else "",
            version=current.version,
            load_time=stamp(current.load_time),
            refused=self._templates.refused.splitlines(),
        )

    async def PreviewTemplate(
        self, request: templates_pb2.PreviewTemplateRequest, context: _Context
    ) -> templates_pb2.PreviewTemplateResponse:
        said, _ = await self._try(request, html=not request.without_html)
        return templates_pb2.PreviewTemplateResponse(
            subject=said.subject, text=said.text, html=said.html, version=said.version, locale=said.locale
        )

    async def SendTestTemplate(
        self, request: templates_pb2.SendTestTemplateRequest, context: _Context
    ) -> templates_pb2.SendTestTemplateResponse:
        if not _is_address(request.to):
            raise invalid(Violation("to", "must be an email address"))
        said, name = await self._try(request, html=True)
        subject, key = _TEST + said.subject, message_id(uuid.uuid4(), self._sender)
        message = Message(
            target=request.to,
            idempotency_key=key,
            content=Mail(name, subject, said.text, said.html).encode(),
            create_time=datetime.now(UTC),
        )
        try:
            async with asyncio.timeout(self._send_timeout):
                outcome = await self._email.send(message)
        except TimeoutError:
            outcome = Outcome(Result.FAILED, detail=f"no answer within {self._send_timeout:g} s")
        log.info("a template was sent as a test", template=request.template, outcome=outcome.result.name)
        return templates_pb2.SendTestTemplateResponse(
            outcome=outcome.result.value,
            code=outcome.code,
            detail=outcome.detail,
            message_id=key,
            subject=subject,
            version=said.version,
            locale=said.locale,
        )

    async def _try(
        self, request: templates_pb2.PreviewTemplateRequest | templates_pb2.SendTestTemplateRequest, *, html: bool
    ) -> tuple[Rendered, str]:
        """What a template says for a request's sample, and to whom."""
        if not request.template:
            raise invalid(Violation("template", "is required"))
        if request.template not in self._templates.current.files.names():
            raise errors.unknown_template(request.template)
        kinds = [rule.on[0] for rule in self._composer.rules if rule.template == request.template]
        view, which = samples.view(requests.plain(request.sample), kinds[0] if kinds else "UPDATED")
        seen = addressed(view, which, view["unsubscribe_url"])
        if self._is_of_digest(request.template):
            seen = gathered.context(samples.items(seen), samples.DIGEST, view["unsubscribe_url"])
        locale = request.locale or str(view["user"]["locale"])
        render: Callable[[], Rendered] = lambda: self._rendered(request.template, seen, locale, html)  # noqa: E731
        async with self._tried:
            try:
                said = await asyncio.to_thread(render)
            except RenderError as error:
                raise errors.template_failed(str(error)) from None
        if said.html_problem:
            raise errors.template_failed(said.html_problem)
        return said, str(seen["name"])

    def _users_of(self, name: str) -> list[str]:
        """What a template says, by the names of rules; digests are there as what stands for their rule."""
        rules = [rule.name for rule in self._composer.rules if rule.template == name]
        return rules + [digest_rule(one.name) for one in self._composer.digests.values() if one.template == name]

    def _is_of_digest(self, name: str) -> bool:
        """Whether a template says a digest: by the rules file, else by its name."""
        if any(one.template == name for one in self._composer.digests.values()):
            return True
        return name == samples.DIGEST["name"] and all(rule.template != name for rule in self._composer.rules)

    def _rendered(self, name: str, seen: dict[str, Any], locale: str, html: bool) -> Rendered:
        apart = self._templates.apart()
        try:
            return apart.render(name, seen, locale=locale, html=html)
        finally:
            apart.close()

    async def ReloadTemplates(
        self, request: templates_pb2.ReloadTemplatesRequest, context: _Context
    ) -> templates_pb2.ReloadTemplatesResponse:
        try:
            changed = await asyncio.to_thread(self._templates.reload, self._composer.needs())
        except InvalidConfigError as error:
            raise errors.templates_refused(str(error)) from None
        current = self._templates.current
        log.info("templates reloaded by a call", version=current.version, changed=changed)
        return templates_pb2.ReloadTemplatesResponse(
            version=current.version, load_time=stamp(current.load_time), changed=changed
        )


def _is_address(text: str) -> bool:
    local, _, host = text.rpartition("@")
    plain = not any(one.isspace() or not one.isprintable() or one in '<>,;:"()[]' for one in text)
    return bool(local and host) and "@" not in local and plain and len(text.encode()) <= _LONGEST_ADDRESS
