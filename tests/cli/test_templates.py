"""`tidings templates`, before the servicer of the notification service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from notification_service import lanes, rules
from notification_service.api.templates import TemplateService
from notification_service.channels.email import EmailChannel
from notification_service.compose import Composer
from notification_service.templates import Templates
from servicekit import callers, guard
from tests.cli.conftest import Tidings
from tidings.notifications.v1 import templates_pb2_grpc

_SENDER = "t@tidings.localhost"


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[str]:
    """The address of the service; nothing takes its mail."""
    (tmp_path / "own").mkdir()
    composer = Composer(rules.load(None), Templates(tmp_path / "own"), lanes.writers(_SENDER, ()))
    email = EmailChannel("127.0.0.1", 1, sender=_SENDER, timeout=5.0)
    server = grpc.aio.server()
    guard.add(
        server,
        callers.anyone,
        templates_pb2_grpc.add_TemplateServiceServicer_to_server,
        TemplateService(composer, email, _SENDER, send_timeout=5.0),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(1.0)


async def test_templates(tidings: Tidings, at: str, tmp_path: Path) -> None:
    async def ran(*arguments: str) -> tuple[int, str, str]:
        done = await tidings("templates", *arguments, "--notifications", at)
        return done.code, done.out, done.err

    code, out, _ = await ran("list")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["announcement", "-"],
        ["digest", "-"],
        ["email-changed", "-"],
        ["goodbye", "-"],
        ["welcome", "-"],
    ]
    code, out, _ = await ran("preview", "welcome", "--locale", "de", "--json")
    assert (code, json.loads(out)["subject"]) == (0, "Willkommen, Ada Lovelace")
    code, out, _ = await ran("preview", "welcome", "--part", "subject", "--sample", '{"user": {"display_name": "Bob"}}')
    assert (code, out) == (0, "Welcome, Bob\n")
    code, out, _ = await ran("preview", "digest", "--part", "text", "--sample", '{"user": {"display_name": "Bob"}}')
    assert (code, out.startswith("Hello Bob,"), out.count("\n- ")) == (0, True, 2)
    params = '{"params": {"subject": "Rain", "text": "Today."}}'
    assert (await ran("preview", "announcement", "--part", "subject", "--sample", params))[:2] == (0, "Rain\n")
    assert (await ran("preview", "absent"))[0] == 4
    assert (await ran("preview", "welcome", "--sample", "[]"))[0] == 2
    code, _, err = await ran("send-test", "welcome", "--to", "ada@example.com")
    assert (code, "cannot connect" in err) == (1, True)
    (tmp_path / "own" / "welcome.txt").write_text("{% if %}")
    code, _, err = await ran("reload")
    assert (code, "template welcome.txt, line 1" in err) == (5, True)
    for option in ((), ("--json",)):
        code, _, err = await ran("list", *option)
        assert (code, "refused: rule 'welcome': template welcome.txt, line 1" in err) == (0, True)
    (tmp_path / "own" / "welcome.txt").write_text("{{ nobody }}")
    code, out, _ = await ran("reload")
    assert (code, "changed" in out) == (0, True)
    assert "refused" not in (await ran("list"))[2]
    code, _, err = await ran("preview", "welcome")
    assert (code, "template welcome.txt, line 1: UndefinedError" in err) == (5, True)
